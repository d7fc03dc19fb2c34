"""Studies: which optimizer for which batch size, and what the papers' headline results look like on this machine.

``compare(CompareConfig(...), out=...)`` tunes every optimizer at every batch size with the same budget, measures it with
fresh seeds, and leaves a table, plots and an HTML report in a run directory that can be resumed.
"""

from conjugo.studies.compare import compare, load_result
from conjugo.studies.results import CompareConfig, CompareResult

__all__ = ["CompareConfig", "CompareResult", "compare", "load_result"]
