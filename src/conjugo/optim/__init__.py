"""Drop-in PyTorch optimizers for large batches.

``NLCG`` is the stochastic preconditioned nonlinear conjugate gradient method of Adya, Palakkode & Tuzel (2018): one gradient
per step like SGD and a momentum that is computed instead of tuned. It orthogonalises the gradients of matrices unless told
otherwise (``Orthogonal``, ``Kronecker``, ``AdamDiagonal``; the paper's diagonal model of the curvature is ``precond="bfgs"``);
``parameter_groups`` makes a choice for each role (``roles``) that parameters have in a model. Use it where batches are so
large that the number of steps is what limits training.
``LARS`` (You, Gitman & Ginsburg 2017) and ``LAMB`` (You et al. 2020) scale the step layer by layer; ``MCLR`` and ``CBLR``
(Gao & Zhong 2020) do so by its curvature. ``schedules`` holds learning-rate and batch-size schedules and the rules that scale
a learning rate with the batch, ``averaging`` running averages of weights. ``DiscardSmallLoss`` takes the gradient from the
largest losses of a batch only (Gao & Zhong 2020).
``FRSGD`` (Wang & Ye 2020) is SGD with the Fletcher-Reeves momentum; ``AdaGradNorm`` (Ward, Wu & Bottou 2019) has one step
size, which the norms of the gradients decide; ``step_sizes`` holds such rules for the other optimizers.
``minimize`` and ``FullBatchCG`` are the classical methods with a line search, for losses without noise.
"""

from conjugo.optim.adagrad_norm import AdaGradNorm
from conjugo.optim.adaptive_preconditioner import AdamDiagonal
from conjugo.optim.averaging import PolynomialAverage, WeightEMA
from conjugo.optim.cblr import CBLR, MCLR
from conjugo.optim.classical import FullBatchCG, minimize
from conjugo.optim.curvature_statistics import layer_curvature, layer_rates
from conjugo.optim.frsgd import FRSGD
from conjugo.optim.gradient_scales import batch_norm_scales, depth_scales
from conjugo.optim.kronecker import Kronecker
from conjugo.optim.lamb import LAMB
from conjugo.optim.lars import LARS
from conjugo.optim.nlcg import NLCG
from conjugo.optim.orthogonal import Orthogonal
from conjugo.optim.parameter_roles import parameter_groups, roles
from conjugo.optim.small_loss import DiscardSmallLoss

__all__ = [
    "CBLR",
    "FRSGD",
    "LAMB",
    "LARS",
    "MCLR",
    "NLCG",
    "AdaGradNorm",
    "AdamDiagonal",
    "DiscardSmallLoss",
    "FullBatchCG",
    "Kronecker",
    "Orthogonal",
    "PolynomialAverage",
    "WeightEMA",
    "batch_norm_scales",
    "depth_scales",
    "layer_curvature",
    "layer_rates",
    "minimize",
    "parameter_groups",
    "roles",
]
