"""Tasks with right and wrong answers; to add one, write a subclass of `Task` and name it in `TASKS`."""

from __future__ import annotations

from pipeline.evaluation.tasks.exact import Exact
from pipeline.evaluation.tasks.gsm8k import FinalNumber, Program
from pipeline.evaluation.tasks.sudoku import Sudoku
from pipeline.evaluation.tasks.task import Item, Task, Verdict

TASKS: dict[str, type[Task]] = {
    "sudoku": Sudoku,
    "gsm8k-program": Program,
    "gsm8k-number": FinalNumber,
    "exact": Exact,
}

__all__ = ["TASKS", "Item", "Task", "Verdict"]
