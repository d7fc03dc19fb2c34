"""Studies: which optimizer for which batch size, and what the papers' headline results look like on this machine.

``compare(CompareConfig(...), out=...)`` tunes every optimizer at every batch size with the same budget, measures it with
fresh seeds, and leaves a table, plots and an HTML report in a run directory that can be resumed.
``advise(model, loss_fn, data, "sgd")`` says in about a minute how large the batch may be, and what follows.
"""

from conjugo.studies.advice import Advice
from conjugo.studies.advise import advise
from conjugo.studies.compare import compare, load_result
from conjugo.studies.results import CompareConfig, CompareResult

__all__ = ["Advice", "CompareConfig", "CompareResult", "advise", "compare", "load_result"]
