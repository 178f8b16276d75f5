"""The exceptions of the engine."""

from collections.abc import Iterator


class NonRetryableError(Exception):
    """Raised by a task function whose failure no retry can mend: the task fails at once."""


class TaskNotOwnedError(Exception):
    """This attempt does not own its task any more: the worker was taken for dead, or too slow."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The error itself or, for an exception group, its members in order, however deep."""
    pending = [error]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending.extend(reversed(error.exceptions))
        else:
            yield error


def is_retryable(error: BaseException) -> bool:
    """Whether running the task again may help: no part of the failure is a NonRetryableError."""
    return not any(isinstance(leaf, NonRetryableError) for leaf in leaves(error))
