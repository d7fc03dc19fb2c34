"""Optimizers whose scalars are sums over many parameters: all of them, those of a group, or one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from conjugo._space import ParamSpace, Slices, is_dtensor, to_local
from conjugo._tensors import Array, dot, namespace, wide_dtype
from conjugo.errors import check, unknown
from conjugo.optim._base import Group, Optimizer, as_real, state_dtype
from conjugo.optim._fused import suits
from conjugo.optim.preconditioners import Block, Identity
from conjugo.optim.step_sizes import Constant, Seen, StepSize, Verdict

__all__ = ["SCOPES", "ScopedOptimizer"]

SCOPES: tuple[str, ...] = ("global", "group", "tensor")


class ScopedOptimizer(Optimizer):
    """Base class: scalars in one float64 table with a row per parameter, sums over the scope, a plan of who takes part.

    ``state[p]["scalars"]`` is a view of the row of p. A row holds the parameter's own part of every sum, already added up
    over ranks; :meth:`_pool` is the only function that knows the scope. So the state survives that parameters are grouped
    anew, and that some join later.

    A row holds first the scalars of the method, then those of the rule for the step size, the squared norm of the parameter
    before the first step if that rule needs it, and the number of skipped steps. Where the compiled kernels do the vector
    work scalars are numpy arrays on the table's memory, elsewhere tensors.
    """

    _pickled: ClassVar[tuple[str, ...]] = ("scope", "process_group", "foreach", "fused")
    _scopes: ClassVar[tuple[str, ...]] = SCOPES

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        scope: str,
        process_group: Any,
        foreach: bool | None,
        fused: bool | None,
    ) -> None:
        self._check_name("scope", scope, self._scopes)
        check(not (foreach and fused), self._name, "foreach", foreach, "False or None together with fused=True")
        self.scope = scope
        self.process_group = process_group
        self.foreach = foreach
        self.fused = fused
        super().__init__(params, defaults)
        everything = [p for group in self.param_groups for p in group["params"]]
        ParamSpace(everything, group=process_group, owner=self._name)  # all ranks have the same ones, or an error

    # Hooks -----------------------------------------------------------------------------------------------------------

    @property
    def _method_start(self) -> Mapping[str, float]:
        """Names of the method's scalars, with their values before the first step; the first is ``step``, steps taken."""
        raise NotImplementedError

    @property
    def _rule(self) -> StepSize:
        """What decides on step sizes."""
        return Constant()

    def _lay_out(self, blocks: list[Block]) -> bool:
        """Prepare the vector work for the parameters of *blocks*; whether scalars are numpy arrays from now on."""
        raise NotImplementedError

    def _set_changed(self, before: int, now: int) -> None:
        """Called when other parameters have a gradient than in the last step; *before* and *now*: their numbers."""

    def _cut(self, device: torch.device) -> Slices | None:
        """How whole parameters are shared out over the ranks, if they are."""
        return None

    @property
    def _sync(self) -> bool:
        """Whether sums go through a collective even where every rank could work them out."""
        return False

    @property
    def _apart(self) -> bool:
        """Whether each parameter is a block of its own."""
        return False

    # Scalars ---------------------------------------------------------------------------------------------------------

    @property
    def _start(self) -> dict[str, float]:
        """Names and first values of all scalars, in the order of a row."""
        norm = {"norm_squared": 0.0} if self._rule.needs_norm else {}
        return {**self._method_start, **self._rule.start, **norm, "skipped": 0.0}

    def _fresh_scalars(self, p: Tensor) -> Tensor:
        scalars = torch.tensor(list(self._start.values()), dtype=wide_dtype(p.device), device=p.device)
        if self._rule.needs_norm:
            # Once more before the first step: weights may be loaded until then, and sums over ranks are made there.
            scalars[-2] = _square(to_local(p.detach()))
        return scalars

    def _state_replaced(self) -> None:
        """Make the scalars of all parameters rows of one table, and forget what refers to the old tensors."""
        self._active: list[Tensor] = []
        self._common: dict[str, Any] = {}
        params = [p for group in self.param_groups for p in group["params"]]
        devices = {p.device for p in params}
        if len(devices) != 1:
            return  # none, or several, which the first step refuses: a model may be on its way to another device
        self._table = torch.stack([self.state[p]["scalars"] for p in params])
        for p, row in zip(params, self._table.unbind(0), strict=True):
            self.state[p]["scalars"] = row

    @property
    def needs_loss(self) -> bool:
        """Whether a step wants the loss of its batch: ``step(closure)`` or ``step(loss=loss)``."""
        return self._rule.needs_loss

    @property
    def skipped_steps(self) -> Tensor:
        """Steps left out because a gradient or the loss was not finite: 0-d int64, on the device of the parameters."""
        counts = [self.state[p]["scalars"][-1] for group in self.param_groups for p in group["params"]]
        return torch.stack(counts).max().to(torch.int64)

    def _columns(self) -> list[Array]:
        """The scalars of the parameters that take part, by column; each [n]."""
        return list(self._whole_table()[self._rows].T)

    def _rule_state(self, columns: Sequence[Array]) -> tuple[Array, ...]:
        first = len(self._method_start)
        return tuple(columns[first : first + len(self._rule.start)])

    def _decide(
        self, columns: Sequence[Array], *, lr: Array, square: Array, loss: Array = None, distance: Array = None
    ) -> Verdict:
        """The step size by the rule; *square* and *distance* squared: each parameter's own part, [n]."""
        rule = self._rule
        root = namespace(square).sqrt
        seen = Seen(
            step=self._of_eldest(columns[0], columns[0]),
            lr=lr,
            square=self._pool(square),
            loss=None if loss is None else loss + 0 * lr,
            norm=root(self._pool(columns[-2])) if rule.needs_norm else None,
            distance=None if distance is None else root(self._pool(distance)),
        )
        return rule(seen, tuple(self._of_eldest(column, columns[0]) for column in self._rule_state(columns)))

    def _keep_scalars(self, method: Sequence[Array], rule: Sequence[Array], finite: Array) -> None:
        """Keep the new scalars of the method and of the step size, each [n]; where not *finite* the old, and count that."""
        table = self._whole_table()
        xp = namespace(table)
        new = xp.stack([*method, *rule], 1)
        changed = slice(0, new.shape[1])
        if self._on_host and finite:
            table[self._rows, changed] = new
            return
        table[self._rows, changed] = xp.where(finite, new, table[self._rows, changed])
        table[self._rows, -1] += xp.where(finite, 0.0, 1.0)

    def _count_skipped(self) -> None:
        """Count a step that is left out."""
        self._whole_table()[self._rows, -1] += 1

    def _whole_table(self) -> Array:
        """The scalars of all parameters [parameters, columns], as numpy's on the host; writing to it writes the state."""
        return self._table.numpy() if self._on_host else self._table

    def _pool(self, parts: Array) -> Array:
        """Sums over the scope, of one part for each parameter, at each parameter; *parts* and result [..., n]."""
        if self.scope in ("tensor", "row"):
            return parts
        spans = [slice(None)] if self.scope == "global" else self._spans
        if isinstance(parts, np.ndarray):  # a third of the time of what follows
            pooled = np.empty_like(parts)
            for span in spans:
                pooled[..., span] = parts[..., span].sum(-1, keepdims=True)
            return pooled
        pieces = [parts[..., span] for span in spans]
        sums = [torch.broadcast_to(piece.sum(-1)[..., None], piece.shape) for piece in pieces]
        return sums[0] if len(sums) == 1 else torch.concatenate(sums, -1)

    def _of_eldest(self, values: Array, steps: Array) -> Array:
        """Where parameters share a scope, the one of *values* that belongs to the most *steps*; [n].

        The same for all, unless some have joined later.
        """
        if self.scope in ("tensor", "row"):
            return values
        spans = [slice(0, len(values))] if self.scope == "global" else self._spans
        if isinstance(values, np.ndarray):
            found = np.empty_like(values)
            for span in spans:
                found[span] = values[span][steps[span].argmax()]
            return found
        return torch.concatenate(
            [torch.broadcast_to(torch.take(values[span], steps[span].argmax()), steps[span].shape) for span in spans]
        )

    def _per_parameter(self, name: str) -> Array:
        """The option *name* (a number or a 0-d tensor) of each parameter's group, float64 [n]."""
        return self._spread([group[name] for group in self._active_groups])

    def _spread(self, values: list[float | Tensor]) -> Array:
        """One value for each group that takes part, at each of its parameters: float64 [n]."""
        sizes = [span.stop - span.start for span in self._spans]
        if self._on_host:
            return np.repeat([float(value) for value in values], sizes)
        like = self._table
        parts = [
            value.to(like, non_blocking=True).expand(n)
            if isinstance(value, Tensor)
            else torch.full((n,), value, dtype=like.dtype, device=like.device)
            for value, n in zip(values, sizes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _shown(self, values: Mapping[str, Array]) -> dict[str, Tensor]:
        """Numbers of a step for the caller: tensors, 0-d with scope "global", else one value for each parameter."""
        tensors = {name: v if isinstance(v, Tensor) else torch.tensor(v) for name, v in values.items()}
        if self.scope == "global":
            return {name: v if v.ndim == 0 else v[0] for name, v in tensors.items()}
        return tensors

    def _keep(self, lr: Array) -> Array | None:
        """1 - lr weight_decay where the decay is decoupled; None if nowhere."""
        decays = [g["weight_decay"] if g["decoupled"] else 0.0 for g in self._active_groups]
        if not any(decays):
            return None
        keep = namespace(lr).ones_like(lr)
        for span, decay in zip(self._spans, decays, strict=True):
            keep[span] -= lr[span] * decay
        return keep

    # State that is elsewhere -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state; collective where preconditioners leave the state of matrices with the ranks that own them."""
        self.settle()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return super().__getstate__()

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters, with its own options, and allocate its state; also in the middle of training."""
        self.settle()
        super().add_param_group(param_group)

    def settle(self) -> None:
        """Have all state in ``self.state``. Collective, if some lives with its owners."""
        for settle in getattr(self, "_common", {}).get("settle", ()):
            settle()

    # Which parameters take part --------------------------------------------------------------------------------------

    def _prepare(self) -> bool:
        """Find the parameters that take part in this step; whether there are any."""
        work = self._with_gradient()
        active = [p for _, params in work for p in params]
        if not active:
            return False
        if len(active) != len(self._active) or any(a is not b for a, b in zip(active, self._active)):
            if self._active:
                self._set_changed(len(self._active), len(active))
            self._plan(work, active)
        if self._space.has_dtensors:
            self._space.canonical_grads()
        return True

    def _plan(self, work: list[tuple[Group, list[Tensor]]], active: list[Tensor]) -> None:
        """Lay out blocks and vector work for the parameters *active*."""
        everything = [p for group in self.param_groups for p in group["params"]]
        devices = sorted({str(p.device) for p in everything})
        if len(devices) > 1:
            raise RuntimeError(f"{self._name}: all parameters must be on one device, got {', '.join(devices)}")
        self._follow(active[0].device)
        self._space = ParamSpace(
            active,
            group=self.process_group,
            sync=self._sync,
            slices=self._cut(active[0].device),
            labels=[i for i, p in enumerate(everything) if p.grad is not None],
            owner=self._name,
        )
        self._common = {}
        order = {p: i for i, p in enumerate(everything)}
        self._active_groups = [group for group, _ in work]
        self._indices = []
        self._spans: list[slice] = []
        blocks: list[Block] = []
        for group, params in work:
            start = self._spans[-1].stop if self._spans else 0
            self._spans.append(slice(start, start + len(params)))
            position = {p: i for i, p in enumerate(group["params"])}
            self._indices.append([position[p] for p in params])
            blocks += self._blocks(group, params)
        self._active = active
        self._on_host = self._lay_out(blocks)
        rows = torch.tensor([order[p] for p in active])
        self._rows: Array = rows.numpy() if self._on_host else rows.to(self._table.device)
        if len(active) == len(everything):
            self._rows = slice(None)
        if self._rule.needs_norm:
            self._record_norms()

    def _record_norms(self) -> None:
        """Collective if sharded: note the norms of those parameters that have not taken a step yet."""
        table = self._whole_table()
        squares = torch.stack([_square(self._space.local(p)) for p in self._active])
        squares = self._space.reduce(squares.to(self._table))
        squares = squares.numpy() if self._on_host else squares
        old = table[self._rows, -2]
        table[self._rows, -2] = namespace(table).where(table[self._rows, 0] == 0, squares, old)

    def _blocks(self, group: Group, params: list[Tensor]) -> Iterable[Block]:
        """Runs of neighbouring *params* with one type, the same runs on all ranks."""
        foreach = self.foreach if self.foreach is not None else params[0].device.type != "cpu"

        def block(run: list[Tensor]) -> Block:
            states = [{name: to_local(tensor) for name, tensor in self.state[p].items()} for p in run]
            return Block(group, run, states, foreach, self._space.local, space=self._space, common=self._common)

        def copies(p: Tensor) -> object:
            """Where lists are added up as a whole, all of them must count on the same ranks."""
            if is_dtensor(p):
                return foreach and (p.device_mesh, [q.is_replicate() for q in p.placements])
            return foreach and self._space.slices is not None and p.ndim > 0

        run: list[Tensor] = []
        for p in params:
            if run and (self._apart or p.dtype != run[-1].dtype or copies(p) != copies(run[-1])):
                yield block(run)
                run = []
            run.append(p)
        yield block(run)

    def _use_kernels(self, blocks: list[Block]) -> bool:
        """Whether the compiled kernels do the vector work; raises RuntimeError where they must and cannot."""
        fits = suits(blocks)
        if self.fused and not fits:
            plain = all(isinstance(block.precond, Identity) for block in blocks)
            built_in = "" if plain else ", a built-in preconditioner for all or what Adam's scaling is a part of"
            raise RuntimeError(
                f"{self._name}: fused=True needs dense float32 or float64 parameters of one type on a CPU{built_in}, "
                "and the compiled kernels (see `conjugo doctor`)"
            )
        return fits and self.fused is not False and not self.foreach

    def _follow(self, device: torch.device) -> None:
        """Move the state to where the parameters went since construction."""
        if self._table.device == device:
            return
        if self._cut(device) is not None or any(is_dtensor(p) for p in self.state):
            raise RuntimeError(
                f"{self._name}: sharded state cannot follow to {device}: make the optimizer when the model is there"
            )
        for p, state in self.state.items():
            self.state[p] = {name: tensor.to(p.device) for name, tensor in state.items()}
        self._state_replaced()

    def _check_name(self, argument: str, value: object, known: tuple[str | None, ...]) -> None:
        if value not in known:
            unknown(f"{self._name} {argument}", value, [name for name in known if name is not None])


def _square(p: Tensor) -> Tensor:
    """<p, p>, 0-d."""
    values = as_real(p).to(state_dtype(p))
    return dot(values, values)
