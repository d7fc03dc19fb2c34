"""The curvature of a loss: symmetric matrices that are known by their products with vectors, and what can be asked of them.

``hessian(model, loss_fn, data)`` is the matrix of second derivatives of the loss over a whole data set, as an operator;
``eigsh``, ``trace``, ``diagonal``, ``condition_number`` and ``gradient_alignment`` answer single questions about any operator.
"""

from conjugo.curvature.diagnostics import Alignment, ConditionNumber, condition_number, gradient_alignment
from conjugo.curvature.eigenpairs import Eigenpairs, eigsh
from conjugo.curvature.estimators import Estimate, diagonal, trace
from conjugo.curvature.network import hessian
from conjugo.curvature.operator import Operator, from_dense, from_matvec

__all__ = [
    "Alignment",
    "ConditionNumber",
    "Eigenpairs",
    "Estimate",
    "Operator",
    "condition_number",
    "diagonal",
    "eigsh",
    "from_dense",
    "from_matvec",
    "gradient_alignment",
    "hessian",
    "trace",
]
