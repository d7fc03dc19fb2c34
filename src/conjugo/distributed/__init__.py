"""What many workers share, beginning with the data: which examples make up which global batch.

``GlobalBatchSampler`` draws the batches of a whole training run, however many workers share each of them.
"""

from conjugo.distributed.sampler import GlobalBatchSampler

__all__ = ["GlobalBatchSampler"]
