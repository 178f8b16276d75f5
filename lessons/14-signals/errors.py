"""The exceptions of the engine."""

from shared import error_parts


class NonRetryableError(Exception):
    """Raised by a task function whose failure no retry can mend: the task fails at once."""


class TaskNotOwnedError(Exception):
    """This attempt does not own its task any more: the worker was taken for dead, or too slow."""


class NonDeterminismError(NonRetryableError):
    """A task did not do what its event log says it did in an earlier attempt."""


class ChildTaskError(NonRetryableError):
    """A child task failed. The log leads to it: the next attempt would only see it again."""

    def __init__(self, child_task_id: int, task_name: str, error: str) -> None:
        super().__init__(f"child task {child_task_id} ({task_name}) failed: {error}")
        self.child_task_id = int(child_task_id)  # which is recorded, whoever raised it
        self.task_name = task_name
        self.error = error


class SignalTimeoutError(NonRetryableError):
    """No signal came in time. The log keeps that: the next attempt would only see it again."""


def is_retryable(error: BaseException) -> bool:
    """Whether running the task again may help: no part of the failure is a NonRetryableError."""
    return not any(issubclass(type(part), NonRetryableError) for part in error_parts(error))


def child_error(error: BaseException) -> ChildTaskError | None:
    """The first ChildTaskError that is part of a failure."""
    for part in error_parts(error):
        # Of that very class, with an id: a subclass of the user's may lack it, a function spoil it.
        if type(part) is ChildTaskError and type(vars(part).get("child_task_id")) is int:
            return part
    return None
