"""The tasks a model can be trained on, by name."""

from diffpo_jax.tasks import countdown, math, sudoku
from diffpo_jax.tasks.base import Problem, Task

TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in (sudoku, countdown, math)}

__all__ = ["TASKS", "Problem", "Task"]
