"""What is in an exception, and what it says, whatever its class does."""

import re
from collections.abc import Iterator

MAX_ERROR_CHARACTERS = 10_000


def error_text(error: BaseException) -> str:
    """An exception's type and message; of an exception group also those of all errors in it.

    The text suits jsonb: NUL and lone surrogates are replaced, MAX_ERROR_CHARACTERS is its limit.
    """
    texts = [describe(error)]
    waiting = [error]
    # A loop, since recursion would fail on a group nested a thousand deep.
    while waiting and len(texts) < MAX_ERROR_CHARACTERS:
        current = waiting.pop()
        # Not by its own attribute, which may be the user's code and raise anything at all.
        if issubclass(type(current), BaseExceptionGroup):
            waiting.extend(reversed(BaseExceptionGroup.exceptions.__get__(current)))
        elif current is not error:
            texts.append(describe(current))
    text = "; ".join(texts)
    if len(text) > MAX_ERROR_CHARACTERS:
        text = text[: MAX_ERROR_CHARACTERS - 1] + "…"
    return re.sub("[\0\ud800-\udfff]", "\ufffd", text)


def describe(error: BaseException) -> str:
    """`TypeName: message` of one exception, of which little more than can be kept."""
    name = "Exception"
    try:
        name = f"{type(error).__name__}"
        message = "".join(str(error))
    except BaseException:
        # Both may be the user's code and raise anything at all.
        message = "(its message could not be read)"
    text = f"{name}: {message}" if message else name
    return text[: MAX_ERROR_CHARACTERS + 1]


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
