"""The methods by name, and the options that all entries share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conjugo.errors import check, unknown
from conjugo.optim.classical.conjugate import FAMILY, conjugate_gradients
from conjugo.optim.classical.protocol import Algorithm, Limits, Memory
from conjugo.optim.classical.scaled import scaled_conjugate_gradients

__all__ = ["METHODS", "Options"]

METHODS = (*FAMILY, "scg")
"""Names that :func:`conjugo.optim.minimize` and its relatives take as ``method``."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user chooses, checked. *owner* is who complains; eps: rounding unit of the numbers used."""

    owner: str
    method: str = "powell-beale"
    gtol: float = 1e-5
    f_tol: float = 0.0
    max_iter: int | None = None
    max_eval: int | None = None
    c1: float = 1e-4
    c2: float = 0.1
    curvature: str = "difference"

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for an option out of range."""
        owner = self.owner
        if self.method not in METHODS:
            unknown(f"{owner} method", self.method, METHODS)
        if self.curvature not in ("difference", "hvp"):
            unknown(f"{owner} curvature", self.curvature, ("difference", "hvp"))
        check(
            self.curvature == "difference" or self.method == "scg",
            owner,
            "curvature",
            self.curvature,
            "'difference' unless method is 'scg'",
        )
        check(0 <= self.gtol < math.inf, owner, "gtol", self.gtol, "in [0, inf)")
        check(0 <= self.f_tol < math.inf, owner, "f_tol", self.f_tol, "in [0, inf)")
        check(self.max_iter is None or self.max_iter >= 0, owner, "max_iter", self.max_iter, ">= 0 or None")
        check(self.max_eval is None or self.max_eval >= 1, owner, "max_eval", self.max_eval, ">= 1 or None")
        check(0 < self.c1 < 0.5, owner, "c1", self.c1, "in (0, 0.5)")
        check(self.c1 < self.c2 < 1, owner, "c2", self.c2, f"in (c1, 1) = ({self.c1}, 1)")

    @property
    def beale(self) -> bool:
        """Whether the direction has Beale's third term."""
        return self.method != "scg" and FAMILY[self.method].beale

    @property
    def vectors(self) -> int:
        """Vectors of a driver beside its three points: their gradients and the direction, with Beale's method two more."""
        return 6 if self.beale else 4

    @property
    def norms(self) -> bool:
        """Whether the algorithm needs <d, d>."""
        return self.method != "scg" and FAMILY[self.method].norms

    def algorithm(self, memory: Memory, size: int, eps: float) -> Algorithm:
        """A generator for one problem of *size* real variables, in numbers whose rounding unit is *eps*."""
        limits = Limits(
            gtol=self.gtol,
            f_tol=self.f_tol,
            # SciPy's limit, which only ends what does not converge.
            max_iter=200 * size if self.max_iter is None else self.max_iter,
            max_eval=1000 * size if self.max_eval is None else self.max_eval,
            c1=self.c1,
            c2=self.c2,
            noise=8 * eps,
            size=size,
        )
        if self.method == "scg":
            # Møller's 5e-5 for float64; a difference in float32 needs more.
            sigma = 5e-5 if eps < 1e-10 else 1e-3
            return scaled_conjugate_gradients(memory, limits, sigma=sigma, exact=self.curvature == "hvp")
        return conjugate_gradients(FAMILY[self.method], memory, limits)
