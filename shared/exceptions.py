"""Looking into exceptions that user code has raised, whatever their classes do."""

from collections.abc import Iterator


def error_parts(error: BaseException) -> Iterator[BaseException]:
    """The error, the members of exception groups in it, and what it was raised `from`; each once.

    In order, an error before its members and its cause, however deep they are nested.
    """
    seen: set[int] = set()
    pending = [error]
    # A loop, since recursion would fail on a group nested a thousand deep.
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        # Read behind its back: a class of the user's may have any `__cause__` and `exceptions`.
        cause = BaseException.__dict__["__cause__"].__get__(part)
        if cause is not None:
            pending.append(cause)
        if issubclass(type(part), BaseExceptionGroup):
            pending.extend(reversed(BaseExceptionGroup.exceptions.__get__(part)))
