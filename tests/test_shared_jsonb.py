"""JSON between Python and jsonb."""

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from programs import small_lesson
from shared import UnreadableJson, open_pool
from shared.jsonb import MAX_JSON_CHARACTERS, dumps, loads

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=30)
@given(json_values)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert loads(dumps(value)) == value


@given(st.text())
def test_reading_never_raises(text: str) -> None:
    loads(text)


@given(st.binary())
def test_reading_bytes_never_raises(data: bytes) -> None:
    loads(data)


def endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def deep(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [endless(), deep(100_000)], ids=["circular", "deep"])
def test_what_nests_too_deeply_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        dumps(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, [-math.inf], {"a": math.nan}], ids=repr)
def test_what_json_has_no_word_for_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps(value)


@pytest.mark.parametrize("value", [Decimal(1), {1, 2}, b"x", {(1, 2): 3}], ids=repr)
def test_what_is_no_json_value_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        dumps(value)


def test_what_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_JSON_CHARACTERS == 2**24
    monkeypatch.setattr("shared.jsonb.MAX_JSON_CHARACTERS", 1_002)
    assert len(dumps("x" * 1_000)) == 1_002
    with pytest.raises(ValueError, match="1,003 characters"):
        dumps("x" * 1_001)


def test_what_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs can store it."""
    monkeypatch.setattr("shared.jsonb.MAX_JSON_CHARACTERS", 1_002)
    assert loads(f'"{"x" * 1_000}"') == "x" * 1_000
    for data in (f'"{"x" * 1_001}"', b'"%s"' % (b"x" * 1_001)):
        value = loads(data)
        assert isinstance(value, UnreadableJson)
        assert "1,003 characters" in value.reason


def test_what_nests_too_deeply_to_be_read_is_not_read() -> None:
    """How deep that is depends on the version of Python; some read all that Postgres stores."""
    assert isinstance(loads("[" * 1_000_000 + "]" * 1_000_000), UnreadableJson)


UNREADABLE = {
    "digits": "9" * 5_000,
    "large": f'"{"x" * 2**24}"',
    "float": "1" + "0" * 400 + ".5",
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
async def test_an_unreadable_value_does_not_break_the_fetch_of_others(
    text: str, database: str, tmp_path: Path
) -> None:
    lesson = small_lesson(tmp_path)
    async with open_pool(lesson) as pool, pool.connection() as conn:
        cursor = await conn.execute(
            "SELECT value::jsonb AS value FROM unnest(%s::text[]) AS value", [["1", text, "2"]]
        )
        one, unreadable, two = [row["value"] for row in await cursor.fetchall()]
    assert (one, two) == (1, 2)
    assert isinstance(unreadable, UnreadableJson)
    assert unreadable.reason


async def test_the_pool_writes_json_strictly(database: str, tmp_path: Path) -> None:
    async with open_pool(small_lesson(tmp_path)) as pool, pool.connection() as conn:
        with pytest.raises(ValueError, match="not JSON compliant"):
            await conn.execute("SELECT %s", [Jsonb(math.nan)])
        row = await (await conn.execute("SELECT %s AS value", [Jsonb({"a": [1]})])).fetchone()
    assert row == {"value": {"a": [1]}}
