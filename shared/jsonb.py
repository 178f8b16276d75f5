"""JSON between Python and jsonb: strict on the way in, never raising on the way out."""

import json
import math
from dataclasses import dataclass
from typing import Any

from shared.errors import error_text

# Making and reading a value holds up the event loop, and with it heartbeats: a hundred million
# characters for longer than a heartbeat may be late.
MAX_JSON_CHARACTERS = 2**24

# Made once: making them takes longer than reading or writing a small value.
# Without check_circular a circular value is simply one that nests for ever.
ENCODER = json.JSONEncoder(allow_nan=False, check_circular=False)


@dataclass(frozen=True)
class UnreadableJson:
    """Stands in a row for a JSON value that Postgres holds and Python cannot read."""

    reason: str


def dumps(value: object) -> str:
    """The JSON text of a value.

    Raises ValueError for NaN, infinities, nesting beyond Python's recursion limit and text over
    MAX_JSON_CHARACTERS, TypeError for what JSON does not know.
    """
    try:
        text = ENCODER.encode(value)
    except RecursionError:
        raise ValueError("a JSON value is nested too deeply, or contains itself") from None
    except (TypeError, ValueError):
        raise
    except BaseException as error:
        # From the value's own methods. It must not pass for an outage, a cancellation or an exit.
        raise ValueError(f"making JSON of a value failed: {error_text(error)}") from None
    if len(text) > MAX_JSON_CHARACTERS:
        raise ValueError(too_large(text))
    return text


def too_large(text: str | bytes) -> str:
    """The message on a JSON text that is too large."""
    return (
        f"a JSON value of {len(text):,} characters is too large: "
        f"{MAX_JSON_CHARACTERS:,} is the limit"
    )


def loads(data: str | bytes) -> Any:
    """The value of a JSON text, or an UnreadableJson with the reason.

    psycopg reads a whole batch of rows at once: an exception here would lose them all. Other
    programs can store larger values than dumps does; those are not read.
    """
    if len(data) > MAX_JSON_CHARACTERS:
        return UnreadableJson(too_large(data))
    try:
        return DECODER.decode(data if isinstance(data, str) else data.decode())
    except Exception as error:
        return UnreadableJson(f"Python cannot read it: {error}")


def _finite_float(digits: str) -> float:
    """float() turns a number beyond its range into an infinity, which is not what was stored."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"a number of {len(digits)} characters is beyond the range of a float")
    return number


DECODER = json.JSONDecoder(parse_float=_finite_float)
