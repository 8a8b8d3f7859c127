"""The tasks a model can be trained on, by name."""

from diffpo_jax.tasks import countdown, countdown_cd3, gsm8k, math, math500, reasoning_gym, sudoku, sudoku_4x4
from diffpo_jax.tasks.base import Problem, Task

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (sudoku, countdown, math, gsm8k, math500, countdown_cd3, sudoku_4x4, reasoning_gym)
}
# the published tasks as the released d1 code rewards and scores them, where that changes a number
D1_TASKS: dict[str, Task] = {module.D1_TASK.name: module.D1_TASK for module in (gsm8k, math500, countdown_cd3, sudoku_4x4)}


def find_task(name: str, d1_faithful: bool = False) -> Task:
    """The task of that name; with `d1_faithful` as the released d1 code does it.

    Raises:
      ValueError: there is none; the message lists those there are.
    """
    tasks = D1_TASKS if d1_faithful else TASKS
    if name not in tasks:
        what = "is not a task of the released d1 code (data.d1_faithful)" if name in TASKS else "is unknown"
        raise ValueError(f"task.name {name!r} {what}: use one of {', '.join(sorted(tasks))}")
    return tasks[name]


__all__ = ["D1_TASKS", "TASKS", "Problem", "Task", "find_task"]
