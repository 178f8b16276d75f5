"""The exceptions of the engine."""

from shared import error_parts


class NonRetryableError(Exception):
    """Raised by a task function whose failure no retry can mend: the task fails at once."""


class TaskNotOwnedError(Exception):
    """This attempt does not own its task any more: the worker was taken for dead, or too slow."""


def is_retryable(error: BaseException) -> bool:
    """Whether running the task again may help: no part of the failure is a NonRetryableError."""
    return not any(issubclass(type(part), NonRetryableError) for part in error_parts(error))
