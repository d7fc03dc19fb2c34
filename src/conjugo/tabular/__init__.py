"""Small networks for tables, trained by classical conjugate gradients, as scikit-learn estimators.

With some hundred to some ten thousand rows and a few hundred weights the gradient over all rows costs milliseconds and is
exact. Conjugate gradients (Fletcher & Reeves 1964, Polak & Ribiere 1969, Powell 1977, Moller 1993) then come to a tight
optimum without a learning rate, and the same seed gives the same model, bit for bit. Networks trained by these rules are
common for credit decisions (al-Brahimi & Al-Fakhry 2022). Above about 1e9 rows times weights a full gradient no longer pays:
take :class:`conjugo.optim.NLCG` with large batches. For heterogeneous tables with much interaction try gradient boosting
first.
"""

from conjugo.tabular.classifier import CGClassifier
from conjugo.tabular.regressor import CGRegressor

__all__ = ["CGClassifier", "CGRegressor"]
