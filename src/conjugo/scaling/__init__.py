"""How large the batch may be, and what follows from its size: noise scales, learning-rate rules, width, batch norm.

``gradient_noise_scale(model, loss_fn, data)`` measures how noisy gradients are, in examples; ``NoiseScaleMonitor`` does so
during training. The laws that go from there to steps, examples, learning rates and time are plain functions. ``bngd`` is
gradient descent with batch norm on least squares, where all of it can be known exactly; ``width`` is how the best noise of
SGD changes with the width of a network.
"""

from conjugo.scaling.metric import diagonal_metric
from conjugo.scaling.noise_scale import NoiseScale, gradient_noise_scale

__all__ = ["NoiseScale", "diagonal_metric", "gradient_noise_scale"]
