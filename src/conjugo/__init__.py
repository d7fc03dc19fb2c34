"""conjugo: train PyTorch models on very large batches without losing accuracy."""

from conjugo._version import __version__
from conjugo.optim import NLCG

__all__ = ["NLCG", "__version__"]
