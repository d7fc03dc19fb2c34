"""What the parameters of a model are to an optimizer: matrices, vectors, embeddings, heads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from conjugo.errors import check, unknown
from conjugo.optim.adaptive_preconditioner import AdamDiagonal
from conjugo.optim.matrix_preconditioners import shape_of
from conjugo.optim.orthogonal import Orthogonal

__all__ = ["ROLES", "Role", "parameter_groups", "roles"]

Role = Literal["matrix", "vector", "embedding", "head"]

ROLES: tuple[Role, ...] = ("matrix", "vector", "embedding", "head")

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

_TABLES = frozenset(
    {"emb", "embs", "embed", "embeds", "embedding", "embeddings", "position", "positions", "positional"}
)
"""Words in the names of parameters that are tables without a module of their own."""

_NO_TABLES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.modules.conv._ConvTransposeNd,
    nn.MultiheadAttention,
    nn.RNNBase,
)
"""Modules whose weights are no tables, whatever they are called."""


def roles(model: nn.Module, *, heads: Iterable[str] | None = None) -> dict[Tensor, Role]:
    """The role of each parameter of *model*, in the order of ``model.parameters()``.

    * ``"vector"``: has fewer than two dimensions, a single row or column as a matrix [out, in * ...], or is the kernel of a
      depthwise convolution, whose rows have nothing to do with each other;
    * ``"embedding"``: the weight of an ``nn.Embedding`` or ``nn.EmbeddingBag``, also where a head shares it; tables by a
      word in the name of the parameter or of its module (``emb``, ``embed``, ``embedding``, ``position``, ``positional``, and
      plurals; ``_``, ``.`` and digits separate words), unless that is a linear, convolutional, attention or recurrent layer;
    * ``"head"``: the weights of the modules named in *heads*, a name or several; None: of the last module that has a weight of
      its own with two dimensions or more and is no table, in the order in which the model lists its modules. If that weight
      is a vector, or shared with an embedding, it stays that, and no other layer is the head instead;
    * ``"matrix"``: all else.

    The model may be wrapped by DDP, ``fully_shard`` or ``torch.compile``; *heads* are names as in ``named_modules()`` then,
    or their ends after a dot. Raises ValueError for a head that does not exist, TypeError for what is no module.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> list(roles(model).values())
    ['matrix', 'vector', 'head', 'vector']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"roles: model must be an nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    found: dict[Tensor, Role] = {}
    for name, module in modules.items():
        for own, p in module.named_parameters(recurse=False):
            role = _role(module, name, own, p)
            if role == "embedding" or p not in found:
                found[p] = role
    for module in _heads(modules, heads):
        for p in module.parameters():
            if found[p] == "matrix":
                found[p] = "head"
    return {p: found[p] for p in model.parameters()}


def _is_table(module: nn.Module, name: str, own: str) -> bool:
    """Whether the parameter called *own* of *module*, called *name*, is a table by its kind or by its name."""
    # The name of the module, too: a table may be in one of its own. Not those around it, which hold other things as well.
    words = re.split("[^a-z]+", f"{name.rpartition('.')[2]}.{own}".lower())
    return isinstance(module, _EMBEDDINGS) or not (isinstance(module, _NO_TABLES) or _TABLES.isdisjoint(words))


def _role(module: nn.Module, name: str, own: str, p: Tensor) -> Role:
    if p.ndim < 2 or min(shape_of(p)) == 1:
        return "vector"
    if (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and module.groups > 1
        and module.groups == module.in_channels
    ):
        return "vector"
    return "embedding" if _is_table(module, name, own) else "matrix"


def _heads(modules: Mapping[str, nn.Module], names: Iterable[str] | None) -> list[nn.Module]:
    if names is None:
        # By dimensions, not by roles: a last layer that is a vector or tied is the last layer all the same.
        weighty = [
            module
            for name, module in modules.items()
            if any(p.ndim > 1 and not _is_table(module, name, own) for own, p in module.named_parameters(recurse=False))
        ]
        return weighty[-1:]
    chosen = []
    for wanted in [names] if isinstance(names, str) else names:
        matching = [m for name, m in modules.items() if name and (name == wanted or name.endswith(f".{wanted}"))]
        if not matching:
            unknown("roles heads", wanted, [name for name in modules if name])
        chosen += matching
    return chosen


def parameter_groups(
    model: nn.Module,
    *,
    matrix: Mapping[str, Any] | None = None,
    vector: Mapping[str, Any] | None = None,
    embedding: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    heads: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Groups for :class:`~conjugo.optim.NLCG`, one for each role that *model* has parameters of.

    matrix, vector, embedding, head: options of these groups, over the defaults: ``precond="orthogonal"`` for matrices, which
    gives those with few rows or columns Adam's scaling, and that for the others. heads: see :func:`roles`. Parameters that
    need no gradient are left out. Each group has its ``role`` besides.

    Raises ValueError if no parameter needs a gradient, and as :func:`roles`.

    >>> from conjugo.optim import NLCG
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> groups = parameter_groups(model, vector={"weight_decay": 0.0})
    >>> [(group["role"], len(group["params"])) for group in groups]
    [('matrix', 1), ('vector', 2), ('head', 1)]
    >>> optimizer = NLCG(groups, lr=0.01, weight_decay=0.1, decoupled=True, beta_max=0.9)
    """
    given = {"matrix": matrix, "vector": vector, "embedding": embedding, "head": head}
    rest = AdamDiagonal(beta2=Orthogonal.beta2)  # as in all that it finds too small
    of = roles(model, heads=heads)
    groups = [
        {
            "params": [p for p, role in of.items() if role == name and p.requires_grad],
            "role": name,
            "precond": "orthogonal" if name == "matrix" else rest,
            **(given[name] or {}),
        }
        for name in ROLES
    ]
    kept = [group for group in groups if group["params"]]
    check(bool(kept), "parameter_groups", "model", type(model).__name__, "one with a parameter that needs a gradient")
    return kept
