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
        # Asked for behind the error's back, whose class may have any `__class__` and `exceptions`.
        if issubclass(type(error), BaseExceptionGroup):
            pending.extend(reversed(BaseExceptionGroup.exceptions.__get__(error)))
        else:
            yield error


def is_retryable(error: BaseException) -> bool:
    """Whether running the task again may help: no part of the failure is a NonRetryableError."""
    return not any(issubclass(type(leaf), NonRetryableError) for leaf in leaves(error))
