"""Classical conjugate gradients: full batch, deterministic, with a line search and without a learning rate.

For functions that can be evaluated exactly: all rows of a table, a physics-informed network, an inverse problem. The methods
of Fletcher & Reeves (1964), Polak & Ribiere (1969), Hestenes & Stiefel (1952), Dai & Yuan (1999), Hager & Zhang (2005), Dai &
Kou (2013), Powell's restarts of Beale's three-term method (1977, the default) and Møller's scaled conjugate gradients (1993)
need 3 to 7 vectors of memory and no tuning. Not for mini-batches: differences of noisy gradients are noise, and a line search
needs a function that stays the same; use :class:`conjugo.optim.NLCG` there. With memory for 20 vectors, L-BFGS usually needs
fewer evaluations.
"""

from conjugo.optim.classical.batch import minimize_batch
from conjugo.optim.classical.full_batch import FullBatchCG
from conjugo.optim.classical.methods import METHODS
from conjugo.optim.classical.single import minimize

__all__ = ["METHODS", "FullBatchCG", "minimize", "minimize_batch"]
