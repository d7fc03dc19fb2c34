"""The curvature of a loss: symmetric matrices that are known by their products with vectors, and what can be asked of them.

``hessian(model, loss_fn, data)`` is the matrix of second derivatives of the loss over a whole data set, as an operator;
``ggn``, ``fisher`` and ``gradient_covariance`` are its relatives;
``spectral_density`` estimates the density of all eigenvalues of any operator, by ``lanczos``;
``eigsh``, ``trace``, ``diagonal``, ``condition_number`` and ``gradient_alignment`` answer single questions.
"""

from conjugo.curvature.density import SpectralDensity, spectral_density
from conjugo.curvature.diagnostics import Alignment, ConditionNumber, condition_number, gradient_alignment
from conjugo.curvature.eigenpairs import Eigenpairs, eigsh
from conjugo.curvature.estimators import Estimate, diagonal, trace
from conjugo.curvature.lanczos import LanczosResult, lanczos
from conjugo.curvature.network import NetworkOperator, fisher, ggn, gradient_covariance, hessian
from conjugo.curvature.operator import Operator, from_dense, from_matvec

__all__ = [
    "Alignment",
    "ConditionNumber",
    "Eigenpairs",
    "Estimate",
    "LanczosResult",
    "NetworkOperator",
    "Operator",
    "SpectralDensity",
    "condition_number",
    "diagonal",
    "eigsh",
    "fisher",
    "from_dense",
    "from_matvec",
    "ggn",
    "gradient_alignment",
    "gradient_covariance",
    "hessian",
    "lanczos",
    "spectral_density",
    "trace",
]
