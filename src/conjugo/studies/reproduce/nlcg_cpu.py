"""NLCG at the scale of a CPU: digits, and CIFAR-10 made smaller where that is there and does not take too long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from conjugo.studies.reproduce import nlcg_small
from conjugo.studies.reproduce.nlcg_digits import DigitsResult, digits
from conjugo.studies.reproduce.nlcg_small import SmallResult
from conjugo.studies.reproduce.paper import Request

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["CpuResult", "cpu"]


def cpu(request: Request) -> CpuResult:
    """Do the experiment on digits, then the one on CIFAR-10, whose files are in the sub-folder ``cifar10``."""
    part = replace(request, out=None if request.out is None else request.out / "cifar10")
    reason = nlcg_small.why_not(part)
    on_digits = digits(request)
    return CpuResult(on_digits, nlcg_small.experiment(part) if reason is None else reason)


@dataclass(frozen=True)
class CpuResult:
    """Both parts; cifar10 is a sentence that says why if it was left out."""

    digits: DigitsResult
    cifar10: SmallResult | str

    def tables(self) -> list[RenderableType]:
        """Those of the parts."""
        return self.digits.tables() + ([] if isinstance(self.cifar10, str) else self.cifar10.tables())

    def text(self) -> str:
        """What reproduced and what did not, or was left out."""
        return f"{self.digits.text()}\n{self.cifar10 if isinstance(self.cifar10, str) else self.cifar10.text()}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        cifar10 = self.cifar10 if isinstance(self.cifar10, str) else self.cifar10.to_dict()
        return {"digits": self.digits.to_dict(), "cifar10": cifar10}
