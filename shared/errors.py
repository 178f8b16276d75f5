"""An exception as text for people and for jsonb, whatever it is."""

import re

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
