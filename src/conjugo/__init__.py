"""conjugo: train PyTorch models on very large batches without losing accuracy."""

from conjugo._version import __version__

__all__ = ["__version__"]
