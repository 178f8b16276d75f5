"""The exceptions of the engine."""

from collections.abc import Iterator


class NonRetryableError(Exception):
    """Raised by a task function whose failure no retry can mend: the task fails at once."""


class TaskNotOwnedError(Exception):
    """This attempt does not own its task any more: the worker was taken for dead, or too slow."""


class NonDeterminismError(NonRetryableError):
    """A durable task did not do what its event log says it did in an earlier attempt."""


class ChildTaskError(NonRetryableError):
    """A child task failed. The log keeps that: the next attempt would only see it again."""

    def __init__(self, child_task_id: int, task_name: str, error: str) -> None:
        super().__init__(f"child task {child_task_id} ({task_name}) failed: {error}")
        self.child_task_id = int(child_task_id)  # which is recorded, whoever raised it
        self.task_name = task_name
        self.error = error


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The error itself or, for an exception group, its members in order, however deep."""
    pending = [error]
    while pending:
        error = pending.pop()
        # Asked for behind the error's back, whose class may have any `__class__` and `exceptions`.
        if issubclass(type(error), BaseExceptionGroup):
            pending.extend(reversed(BaseExceptionGroup.exceptions.__get__(error)))
        else:
            yield error


def is_retryable(error: BaseException) -> bool:
    """Whether running the task again may help: no part of the failure is a NonRetryableError."""
    return not any(issubclass(type(leaf), NonRetryableError) for leaf in leaves(error))
