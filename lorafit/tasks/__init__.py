"""What can be trained: one entry of `TASKS` for each task, names alone."""

from lorafit.tasks.names import DEFAULT_TASK, MODEL_KINDS, TASKS, Figure, ModelKind, Task, TaskName, model_kind

__all__ = ["DEFAULT_TASK", "MODEL_KINDS", "TASKS", "Figure", "ModelKind", "Task", "TaskName", "model_kind"]
