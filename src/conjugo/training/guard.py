"""Steps that nothing but finite numbers can change."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from conjugo.distributed import ParamSpace
from conjugo.errors import TrainingDiverged

__all__ = ["Guard"]


class Guard:
    """Takes optimizer steps, but skips those whose gradient is not finite, and counts them.

    The optimizers of this package skip by themselves. torch's fused ones do so on a GPU when they are told
    ``found_inf``, as by a GradScaler. For all others the host must know before it calls ``step``; on a CPU that costs
    nothing.

    What happened in a step is read from the device at :meth:`check`: after every step on a CPU, otherwise after every
    *max_skipped* steps, since reading waits for the device. Until then nothing is lost, because skipped steps do not
    change the parameters. Buffers (the running statistics of batch normalisation) have seen the activations of a
    skipped step already; they are put back to what they were at the last good check.

    Several workers come to the same decisions: sharded gradients are looked at by all.

    Args:
        optimizer: whose steps are taken.
        model: whose buffers are kept.
        max_skipped: so many skipped steps in a row end the training.
        clip_norm: upper limit for the Euclidean norm of the whole gradient, or None.
        needs_loss: ``optimizer.step`` takes the loss.

    With several workers the constructor is collective, and so are :meth:`step` and :attr:`space`.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, *, max_skipped: int, clip_norm: float | None, needs_loss: bool
    ) -> None:
        self.skipped = 0
        self._in_a_row = 0
        self._optimizer = optimizer
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self.space = ParamSpace(self._params, owner="Guard")
        self._max_skipped = max_skipped
        self._clip_norm = clip_norm
        self._needs_loss = needs_loss
        self._skips_itself = hasattr(optimizer, "skipped_steps")
        on_host = self._params[0].device.type == "cpu"
        self._takes_found_inf = not (on_host or self.space.sharded) and all(
            group.get("fused") for group in optimizer.param_groups
        )
        self.window = 1 if on_host else max_skipped
        self._seen: list[Tensor | int] = []  # per step since the last check: how many steps were skipped up to here
        self._buffers = list(model.buffers())
        self._good_buffers = [b.clone() for b in self._buffers]

    def step(self, loss: Tensor) -> None:
        """One step with the gradients that are there; *loss*: mean over the batch (0-d), of all workers.

        Raises TrainingDiverged after *max_skipped* skipped steps in a row.
        """
        if self._clip_norm is not None:
            self._clip(self._clip_norm)
        if self._skips_itself:
            self._step_by_itself(loss)
        else:
            self._step_if_finite(loss)
        if len(self._seen) >= self.window:
            self.check()

    def _clip(self, limit: float) -> None:
        if not self.space.sharded:
            nn.utils.clip_grad_norm_(self._params, limit)
            return
        grads = [p.grad for p in self._params if p.grad is not None]
        factor = (limit / (self.space.norm(grads) + 1e-6)).clamp_(max=1.0)
        torch._foreach_mul_([self.space.local(g) for g in grads], factor.to(grads[0].dtype))

    def _step_by_itself(self, loss: Tensor) -> None:
        grads = [p.grad for p in self._params if p.grad is not None]
        # NaN if the loss is not finite: the optimizer may look at the gradients only.
        self.space.local(grads[-1]).add_(0.0 * loss)
        arguments: dict[str, Any] = {"loss": loss} if self._needs_loss else {}
        self._optimizer.step(**arguments)
        self._seen.append(self._optimizer.skipped_steps.clone())  # type: ignore[attr-defined]

    def _step_if_finite(self, loss: Tensor) -> None:
        grads = [p.grad for p in self._params if p.grad is not None]
        norms = torch._foreach_norm([self.space.local(g) for g in grads] if self.space.sharded else grads)
        total = torch.stack([*norms, loss.to(norms[0].dtype)]).sum()  # finite if all gradients and the loss are
        if self.space.sharded:
            total = self.space.mean(total)
        before = self._seen[-1] if self._seen else self.skipped
        # Not in the first step: fused SGD would leave its momentum buffers uninitialised, and use them in the second.
        if self._takes_found_inf and self._optimizer.state:
            bad = torch.isfinite(total).logical_not_()
            self._optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self._seen.append(before + bad)
        else:
            finite = math.isfinite(total.item())
            if not finite:
                self._optimizer.zero_grad()  # a step without gradients changes nothing
            self._seen.append(before + (not finite))
        self._optimizer.step()

    def check(self) -> None:
        """Read what happened since the last check; raises TrainingDiverged."""
        if not self._seen:
            return
        before = self.skipped
        for skipped in map(int, self._seen):
            self._in_a_row = self._in_a_row + 1 if skipped > self.skipped else 0
            self.skipped = skipped
            if self._in_a_row >= self._max_skipped:
                break
        self._seen.clear()
        if self._buffers:
            good, new = self._good_buffers, self._buffers
            copy = (new, good) if self.skipped > before else (good, new)
            torch._foreach_copy_(*copy)
        if self._in_a_row >= self._max_skipped:
            raise TrainingDiverged(
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite; the weights are those from "
                "before. Try a smaller lr, a longer warmup or clip_norm"
            )

    def state_dict(self) -> dict[str, int]:
        """The counts. Call :meth:`check` first."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from saved counts and from the model's present buffers."""
        self.skipped = state_dict["skipped"]
        self._in_a_row = state_dict["in_a_row"]
        self.keep_buffers()

    def keep_buffers(self) -> None:
        """Take the model's buffers for good as they are now."""
        for good, buffer in zip(self._good_buffers, self._buffers):
            good.copy_(buffer)
