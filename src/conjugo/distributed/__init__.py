"""Many workers, on torch.distributed: the data they share, the sums they agree on, how they start, fail and resume.

``launch`` starts workers; in each ``init`` joins the process group and ``shutdown`` leaves it. ``GlobalBatchSampler`` draws the
batches of a whole training run, however many workers share each of them; ``share`` and ``micro_batches`` are a worker's part
of one; ``VirtualBatch`` adds up gradients over it. ``ParamSpace`` adds up over parameters wherever they lie. ``Checkpointer``
keeps what must not be lost. ``hvp`` multiplies with the Hessian of the loss of all
workers. ``ReplicaCheck`` and ``StragglerMonitor`` watch over them.
"""

from conjugo._space import ParamSpace
from conjugo.distributed.batch_norm import average_statistics, sync_batch_norm, warn_of_small_micro_batch
from conjugo.distributed.checkpoint import Checkpointer, PerRank, RandomState, export_step, export_weights
from conjugo.distributed.environment import Env, init, rank, reported_errors, shutdown, where, world_size
from conjugo.distributed.health import ReplicaCheck, StragglerMonitor
from conjugo.distributed.hessian import curvature_along, hvp, vjp
from conjugo.distributed.launch import launch
from conjugo.distributed.sampler import GlobalBatchSampler, micro_batches, share
from conjugo.distributed.virtual_batch import VirtualBatch, gradient_sync

__all__ = [
    "Checkpointer",
    "Env",
    "GlobalBatchSampler",
    "ParamSpace",
    "PerRank",
    "RandomState",
    "ReplicaCheck",
    "StragglerMonitor",
    "VirtualBatch",
    "average_statistics",
    "curvature_along",
    "export_step",
    "export_weights",
    "gradient_sync",
    "hvp",
    "init",
    "launch",
    "micro_batches",
    "rank",
    "reported_errors",
    "share",
    "shutdown",
    "sync_batch_norm",
    "vjp",
    "warn_of_small_micro_batch",
    "where",
    "world_size",
]
