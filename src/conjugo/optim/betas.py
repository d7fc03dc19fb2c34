"""The conjugate-gradient coefficients beta, as free functions of the inner products of one step.

With g the new gradient, g' the previous one, d' the previous direction, P the preconditioner and y = g - g', all formulas are
ratios of the numbers in :class:`Products`. With an exact line search on a quadratic they are all equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from conjugo._tensors import Array, namespace

__all__ = [
    "RULES",
    "Products",
    "constant",
    "dai_kou",
    "dai_yuan",
    "fletcher_reeves",
    "fletcher_reeves_polak_ribiere",
    "hager_zhang",
    "hestenes_stiefel",
    "hybrid_dai_yuan",
    "polak_ribiere",
    "ratio",
]


@dataclass(frozen=True, kw_only=True)
class Products:
    """Inner products of one step: Python floats, or tensors or arrays of one shape (one value per independent scope).

    Fletcher-Reeves and Polak-Ribiere need the first three only.
    """

    rho: Array  # <g, P g>
    rho_prev: Array  # <g', P g'>
    cross: Array  # <g, P g'>
    yPy: Array = None  # <y, P y>
    dy: Array = None  # <d', y>
    gd: Array = None  # <g, d'>
    dd: Array = None  # <d', d'>


def ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator; 0 where that is not finite or the denominator is 0 (the first step, convergence)."""
    if isinstance(denominator, float):
        value = numerator / denominator if denominator else 0.0
        return value if math.isfinite(value) else 0.0
    xp = namespace(denominator)
    possible = denominator != 0
    value = numerator / xp.where(possible, denominator, 1.0)
    return xp.where(possible & xp.isfinite(value), value, 0.0)


def _at_least(x: Array, bound: Array) -> Array:
    return max(x, bound) if isinstance(x, float) else x.clip(min=bound)


def _at_most(x: Array, bound: Array) -> Array:
    return min(x, bound) if isinstance(x, float) else x.clip(max=bound)


def fletcher_reeves(t: Products) -> Array:
    """<g, P g> / <g', P g'> (Fletcher & Reeves 1964)."""
    return ratio(t.rho, t.rho_prev)


def polak_ribiere(t: Products) -> Array:
    """<y, P g> / <g', P g'> (Polak & Ribiere 1969); may be negative: PR+ clips it at 0."""
    return ratio(t.rho - t.cross, t.rho_prev)


def hestenes_stiefel(t: Products) -> Array:
    """<y, P g> / <d', y> (Hestenes & Stiefel 1952); HS+ clips it at 0."""
    return ratio(t.rho - t.cross, t.dy)


def dai_yuan(t: Products) -> Array:
    """<g, P g> / <d', y> (Dai & Yuan 1999)."""
    return ratio(t.rho, t.dy)


def hybrid_dai_yuan(t: Products) -> Array:
    """max(0, min(HS, DY)) (Dai & Yuan 2001)."""
    return _at_least(_at_most(hestenes_stiefel(t), dai_yuan(t)), 0.0)


def fletcher_reeves_polak_ribiere(t: Products) -> Array:
    """PR clipped to [-FR, FR] (Gilbert & Nocedal 1992)."""
    bound = fletcher_reeves(t)
    return _at_least(_at_most(polak_ribiere(t), bound), -bound)


def hager_zhang(t: Products) -> Array:
    """HS - 2 <y, P y> <g, d'> / <d', y>^2, not below -1/(|d'| min(0.01, |g'|)) (Hager & Zhang 2005)."""
    value = ratio(t.rho - t.cross, t.dy) - 2 * ratio(t.yPy, t.dy) * ratio(t.gd, t.dy)
    floor = -ratio(1.0, t.dd**0.5 * _at_most(t.rho_prev**0.5, 0.01))
    return _at_least(value, floor)


def dai_kou(t: Products) -> Array:
    """max(HS - <y, P y> <g, d'> / <d', y>^2, <g, d'> / (2 |d'|^2)) (Dai & Kou 2013)."""
    value = ratio(t.rho - t.cross, t.dy) - ratio(t.yPy, t.dy) * ratio(t.gd, t.dy)
    return _at_least(value, 0.5 * ratio(t.gd, t.dd))


def constant(t: Products) -> Array:
    """1, whatever the products are; a limit on beta makes it that limit. The control beside the other formulas."""
    return 1.0 if isinstance(t.rho, float) else namespace(t.rho).ones_like(t.rho)


RULES: dict[str, Callable[[Products], Array]] = {
    "fr": fletcher_reeves,
    "pr": polak_ribiere,
    "hs": hestenes_stiefel,
    "dy": dai_yuan,
    "hs-dy": hybrid_dai_yuan,
    "fr-pr": fletcher_reeves_polak_ribiere,
    "hz": hager_zhang,
    "dai-kou": dai_kou,
}
"""The formulas by name. :class:`conjugo.optim.NLCG` offers ``fr`` and ``pr``, the paper's two, and :func:`constant`;
:func:`conjugo.optim.minimize` all, ``pr`` and ``hs`` clipped at 0."""
