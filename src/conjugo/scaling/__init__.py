"""How large the batch may be, and what follows from its size: noise scales, learning-rate rules, width, batch norm.

``gradient_noise_scale(model, loss_fn, data)`` measures how noisy gradients are, in examples; ``NoiseScaleMonitor`` does so
during training. The laws that go from there to steps, examples, learning rates and time are plain functions. ``bngd`` is
gradient descent with batch norm on least squares, where all of it can be known exactly; ``width`` is how the best noise of
SGD changes with the width of a network.
"""

from conjugo.optim.schedules import scale_lr
from conjugo.scaling import bngd, width
from conjugo.scaling.batch_schedule import MeasuredBatchSize
from conjugo.scaling.bn_layers import EffectiveLRTracker, LayerCondition, effective_condition, scale_invariant_groups
from conjugo.scaling.forecast import StepsForecast
from conjugo.scaling.laws import (
    CriticalBatch,
    Interval,
    adascale_gain,
    critical_batch,
    efficient_batch,
    fastest_batch,
    fit_critical_batch,
    optimal_lr,
    scale_adam,
)
from conjugo.scaling.metric import diagonal_metric
from conjugo.scaling.noise_monitor import MicroBatchNorms, NoiseScaleMonitor, attach
from conjugo.scaling.noise_scale import NoiseScale, gradient_noise_scale
from conjugo.scaling.width import normalized_noise_scale

__all__ = [
    "CriticalBatch",
    "EffectiveLRTracker",
    "Interval",
    "LayerCondition",
    "MeasuredBatchSize",
    "MicroBatchNorms",
    "NoiseScale",
    "NoiseScaleMonitor",
    "StepsForecast",
    "adascale_gain",
    "attach",
    "bngd",
    "critical_batch",
    "diagonal_metric",
    "effective_condition",
    "efficient_batch",
    "fastest_batch",
    "fit_critical_batch",
    "gradient_noise_scale",
    "normalized_noise_scale",
    "optimal_lr",
    "scale_adam",
    "scale_invariant_groups",
    "scale_lr",
    "width",
]
