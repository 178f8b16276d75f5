"""Rubbish for test_rubbish.py: bad values, bad errors, and functions that do bad things.

What is made up are recipes, which can be printed, compared and made smaller. The values, which may
do anything when they are looked at, are made from them where they are used.

Not made up is what stops asyncio, the program, or the tasks of others, and so the test as well:
SystemExit and KeyboardInterrupt in an asyncio task or a callback that a function has started,
`loop.stop()`, `os._exit()`, cancelling whatever asyncio.all_tasks() finds, a result with a hostile
__repr__ where asyncio tells of a callback that failed, and code (an endless `items()`, too) that
never comes to an await.
"""

import asyncio
import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from http import HTTPStatus
from typing import Any

import psycopg
from hypothesis import strategies as st
from psycopg_pool import PoolClosed, PoolTimeout


@dataclass(frozen=True)
class Odd:
    """A value of ODD, by its name."""

    name: str


@dataclass(frozen=True)
class Hostile:
    """An object of a class, derived from one of BASES, of which one method or property raises."""

    base: str
    method: str
    error: str


@dataclass(frozen=True)
class Error:
    """One of ERRORS, or of the lesson's own."""

    kind: str
    argument: Any


@dataclass(frozen=True)
class Group:
    """An exception group."""

    message: str
    members: list[Any]


@dataclass(frozen=True)
class Raw:
    """One of INPUTS: JSON as Postgres takes it, and Python perhaps not."""

    name: str


@dataclass(frozen=True)
class Return:
    value: Any


@dataclass(frozen=True)
class Raise:
    error: Any


@dataclass(frozen=True)
class Step:
    """A call of run_task whose error is caught, or that is left to itself."""

    task_name: Any = "innocent"
    input: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    is_left: bool = False


@dataclass(frozen=True)
class Job:
    """A task: what it is given, and what its function does first and at its end."""

    task_name: str
    end: Return | Raise | str
    deeds: Sequence[Step | str] = ()
    input: Any = None
    is_registered: bool = True
    is_durable: bool = False
    max_retries: int = 0

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return self.task_name if self.is_registered else self.task_name + "?"

    @property
    def is_endless(self) -> bool:
        return isinstance(self.end, str) and self.end in ENDLESS

    @property
    def is_unreadable(self) -> bool:
        return isinstance(self.input, Raw) and self.input.name in UNREADABLE


def make(recipe: Any, errors: Any = None) -> Any:
    """The value that a recipe is for. `errors` is the lesson's errors.py."""
    match recipe:
        case Odd(name):
            return ODD[name]()
        case Hostile():
            return make_hostile(recipe)
        case Error(kind, argument):
            value = make(argument, errors)
            error = ERRORS.get(kind) or getattr(errors, kind)
            return error(value, value, value) if kind == "ChildTaskError" else error(value)
        case Group(message, members):
            return BaseExceptionGroup(message, [make(member, errors) for member in members])
        case list():
            return [make(item, errors) for item in recipe]
        case dict():
            return {make(key, errors): make(value, errors) for key, value in recipe.items()}
    return recipe


def make_hostile(recipe: Hostile) -> Any:
    def attack(*arguments: Any) -> Any:
        raise ERRORS[recipe.error]("hostile")

    base, arguments = BASES[recipe.base]
    make_class: Any = type
    member = property(attack) if recipe.method in PROPERTIES else attack
    return make_class("Hostile", (base,), {recipe.method: member})(*arguments)


# Values


def nested(depth: int, key: str | None = None) -> Any:
    value: Any = None
    for _ in range(depth):
        value = [value] if key is None else {key: value}
    return value


def in_itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["itself"] = [value]
    return value


ODD: dict[str, Callable[[], Any]] = {
    "NaN": lambda: math.nan,
    "Infinity": lambda: math.inf,
    "bytes": lambda: b"bytes",
    "set": lambda: {1},
    "tuple": lambda: (1, (2,)),
    "object": object,
    "class": lambda: Odd,
    "function": lambda: nested,
    "error": lambda: ValueError("returned, not raised"),
    "decimal": lambda: Decimal("NaN"),
    "time": lambda: datetime.now(UTC),
    "interval": lambda: timedelta(seconds=1),
    "negative interval": lambda: timedelta(-1),
    "longest interval": lambda: timedelta.max,
    "enum": lambda: HTTPStatus.OK,
    "coroutine": lambda: asyncio.sleep(0),
    "generator": lambda: (n for n in [1]),
    "future": lambda: asyncio.get_running_loop().create_future(),
    "asyncio task": lambda: asyncio.ensure_future(asyncio.sleep(0)),
    "in itself": in_itself,
    "100 deep": lambda: nested(100),
    "100,000 deep": lambda: nested(100_000),
    "100,000 deep dict": lambda: nested(100_000, key="a"),
    "4,000 digits": lambda: 10**4_000,
    "5,000 digits": lambda: 10**5_000,
    "3 MB": lambda: "xyz" * 1_000_000,
}

# As the name of a step these are refused. Nobody would ever claim a child with the name of another.
NO_NAMES = ["bytes", "set", "object", "class", "function", "error", "coroutine", "generator"]
NO_NAMES += ["future", "asyncio task", "in itself", "100,000 deep dict"]

BASES: dict[str, tuple[type, tuple[Any, ...]]] = {
    "object": (object, ()),
    "dict": (dict, ({"a": 1},)),
    "list": (list, ([1],)),
    "str": (str, ("text",)),
    "int": (int, (1,)),
    "float": (float, (0.5,)),
    "Exception": (Exception, ("hostile",)),
    "BaseException": (BaseException, ("hostile",)),
    "ExceptionGroup": (ExceptionGroup, ("hostile", [ValueError("member")])),
}
# Those that somebody might call, by the name of the base.
METHODS = {base: ["__class__", "__getattribute__", "__str__", "__repr__"] for base in BASES}
METHODS["dict"] += ["items", "keys", "__iter__", "__len__", "__getitem__"]
METHODS["list"] += ["__iter__", "__len__", "__getitem__"]
METHODS["str"] += ["__iter__", "__len__", "__format__"]
METHODS["int"] += ["__index__", "__int__", "__hash__"]
METHODS["float"] += ["__float__", "__eq__"]
METHODS["Exception"] += ["args", "__cause__", "__eq__"]
METHODS["BaseException"] += ["args", "__notes__", "__hash__"]
METHODS["ExceptionGroup"] += ["exceptions", "message", "__len__"]
PROPERTIES = ["__class__", "args", "exceptions", "message", "__cause__", "__notes__"]
ATTACKS = ["ValueError", "OperationalError", "RecursionError"]
BASE_ATTACKS = ["CancelledError", "GeneratorExit", "KeyboardInterrupt", "SystemExit"]
VALUE_BASES = ["object", "dict", "list", "str", "int", "float"]
ERROR_BASES = ["Exception", "ExceptionGroup", "BaseException"]

INPUTS = {
    "5,000 digits": "9" * 5_000,
    "beyond a float": "9" * 400 + ".5",
    "5,000 deep": "[" * 5_000 + "]" * 5_000,
    "4,000 digits": "9" * 4_000,
    "nearly nothing": "1e-400",
    "exponent": "1e400",
    "surrogate pair": r'"\ud83d\ude00"',
    "same key twice": '{"a": 1, "a": 2}',
}

UNREADABLE = ["5,000 digits", "beyond a float"]  # and perhaps "5,000 deep"

NASTY = ["", "'", '"', "\\", "%", "%s", "%(id)s", ":id", "::", ";", "$1", "--", "{0}", "\n", "\t"]
NASTY += ["\x7f\x1b[2J", "\u202e", "\ufeff", "\U0010ffff", "x" * 10_000]
UNSTORABLE = ["\0", "a\0b", "\ud800", "\udfff\ud800", "\ud83d\ude00"]
STORABLE_TEXTS = st.lists(
    st.sampled_from(NASTY) | st.characters(exclude_characters="\0", exclude_categories=["Cs"]),
    max_size=4,
).map("".join)
TEXTS = STORABLE_TEXTS | st.lists(
    st.sampled_from(UNSTORABLE) | st.characters(exclude_categories=[]), max_size=4
).map("".join)

TIMEOUT = timedelta(seconds=0.05)  # of what would not end by itself
OPTIONS: st.SearchStrategy[dict[str, Any]] = st.just({}) | st.one_of(
    st.sampled_from([-1, 0, 3, 10**30, 1.5, "7", None, Odd("NaN")]).map(
        lambda value: {"max_retries": value}
    ),
    st.sampled_from([5, "1 second", Odd("negative interval"), Odd("longest interval")]).map(
        lambda value: {"timeout": value}
    ),
    st.sampled_from([True, "yes", 5, None]).map(lambda value: {"is_durable": value}),
)

# Errors


def too_deep(*arguments: Any) -> Any:
    # Not itself: Python 3.13.0 counts only calls with as many arguments as the function names.
    def go_deeper() -> Any:
        return go_deeper()

    return go_deeper()


def too_large(*arguments: Any) -> Any:
    return "x" * 2**60


def by_name(*functions: Any) -> dict[str, Any]:
    return {function.__name__: function for function in functions}


ORDINARY_ERRORS = by_name(
    *(AssertionError, KeyError, MemoryError, OSError, RecursionError, StopAsyncIteration),
    *(StopIteration, TimeoutError, ValueError, PoolClosed, PoolTimeout),
    *(psycopg.DataError, psycopg.InterfaceError, psycopg.OperationalError),
    *(psycopg.errors.AdminShutdown, psycopg.errors.ProgramLimitExceeded),
    *(too_deep, too_large),
)
BASE_ERRORS = by_name(
    *(BaseException, asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
)
ERRORS = ORDINARY_ERRORS | BASE_ERRORS
ERROR_KINDS = [*ERRORS, "NonRetryableError", "ChildTaskError", "NonDeterminismError"]


# Deeds

VARIABLE: ContextVar[Any] = ContextVar("VARIABLE")


def myself() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task
    return task


async def await_nothing_often(input: Any) -> None:
    for _ in range(1_000):
        await asyncio.sleep(0)


async def cancel_myself(input: Any) -> None:
    for _ in range(3):
        myself().cancel("by myself")
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)


async def cancel_and_uncancel_myself(input: Any) -> None:
    await cancel_myself(input)
    for _ in range(5):
        myself().uncancel()


async def leave_a_task_behind(input: Any) -> None:
    async def fail() -> None:
        raise ValueError("in a task left behind")

    VARIABLE.set(asyncio.create_task(fail()))


async def schedule_an_error(input: Any) -> None:
    asyncio.get_running_loop().call_soon(too_deep)


async def await_myself(input: Any) -> None:
    with suppress(RuntimeError):
        await myself()


@types.coroutine
def yield_a_number() -> Iterator[Any]:
    yield 5


async def await_a_number(input: Any) -> None:
    with suppress(RuntimeError):
        await yield_a_number()


async def change_the_input(input: Any) -> None:
    with suppress(AttributeError):
        input.clear()


async def set_a_variable(input: Any) -> None:
    VARIABLE.set(input)


async def call_too_deep(input: Any) -> None:
    with suppress(RecursionError):
        too_deep()


async def time_out(input: Any) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(0):
            await asyncio.sleep(60)


async def rename_myself(input: Any) -> None:
    myself().set_name("\0\ud800%s" * 1_000)


DEEDS = by_name(
    *(await_nothing_often, leave_a_task_behind, schedule_an_error),
    *(await_myself, await_a_number, change_the_input, set_a_variable, call_too_deep),
    *(time_out, rename_myself, cancel_myself, cancel_and_uncancel_myself),
)

# Ends other than to return or to raise; all but the first two need a timeout


async def be_cancelled(is_over: Callable[[], bool]) -> None:
    myself().cancel()
    await asyncio.sleep(0)


async def return_cancelled(is_over: Callable[[], bool]) -> str:
    myself().cancel()
    return "cancelled"


async def never_return(is_over: Callable[[], bool]) -> None:
    await asyncio.get_running_loop().create_future()


async def return_late(is_over: Callable[[], bool]) -> str:
    with suppress(asyncio.CancelledError):
        await never_return(is_over)
    return "late"


async def raise_late(is_over: Callable[[], bool]) -> None:
    with suppress(asyncio.CancelledError):
        await never_return(is_over)
    raise psycopg.OperationalError("late")


async def return_very_late(is_over: Callable[[], bool]) -> str:
    with suppress(asyncio.CancelledError):
        await never_return(is_over)
    await asyncio.sleep(0.3)
    return "very late"


async def go_on_for_ever(is_over: Callable[[], bool]) -> None:
    while not is_over():
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.02)


ENDLESS = by_name(never_return, return_late, raise_late, return_very_late, go_on_for_ever)
ENDS = ENDLESS | by_name(be_cancelled, return_cancelled)


# Strategies


def hostile(bases: list[str]) -> list[Hostile]:
    attacks = ATTACKS + BASE_ATTACKS
    return [Hostile(base, m, a) for base in bases for m in METHODS[base] for a in attacks]


def values() -> st.SearchStrategy[Any]:
    """Recipes of values, JSON and others."""
    simple = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
    odd = st.sampled_from(list(ODD)).map(Odd)
    keys = simple | st.sampled_from(["bytes", "object", "time", "tuple", "enum"]).map(Odd)
    return st.recursive(
        simple | odd | st.sampled_from(hostile(VALUE_BASES)),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=6,
    )


def errors() -> st.SearchStrategy[Any]:
    """Recipes of errors."""
    simple = st.builds(Error, st.sampled_from(ERROR_KINDS), values())
    simple |= st.sampled_from(hostile(ERROR_BASES))
    return st.recursive(
        simple,
        lambda inner: st.builds(Group, TEXTS, st.lists(inner, min_size=1, max_size=3)),
        max_leaves=4,
    )


def steps() -> st.SearchStrategy[Step]:
    """Recipes of children, of which some fail and the others do no harm."""
    innocent = st.builds(Step, st.just("innocent"), values(), OPTIONS, st.booleans())
    failing = st.builds(Step, st.just("failing"), values())
    names = st.sampled_from(UNSTORABLE) | st.sampled_from(NO_NAMES).map(Odd)
    bad = st.builds(Step, names, values())
    another = st.builds(Step, st.just("another"), options=st.just({"timeout": TIMEOUT}))
    return innocent | failing | bad | another


def jobs() -> st.SearchStrategy[Job]:
    """Recipes of tasks."""
    ends = st.builds(Return, values()) | st.builds(Raise, errors()) | st.sampled_from(list(ENDS))
    deeds: st.SearchStrategy[Any] = st.sampled_from(list(DEEDS))

    def job(is_durable: bool) -> st.SearchStrategy[Job]:
        return st.builds(
            Job,
            STORABLE_TEXTS.filter(lambda name: not name.endswith("?")),
            ends,
            st.lists(deeds | steps() if is_durable else deeds, max_size=3),
            values() | st.sampled_from(list(INPUTS)).map(Raw),
            is_registered=st.sampled_from([True] * 7 + [False]),
            is_durable=st.just(is_durable),
            max_retries=st.sampled_from([0, 0, 1, 2]),
        )

    return st.booleans().flatmap(job)


def batches() -> st.SearchStrategy[list[Job]]:
    """Tasks of different names."""
    return st.lists(jobs(), min_size=1, max_size=12, unique_by=lambda job: job.task_name)


# All of it, each alone


def singles() -> list[Job]:
    """A task for each kind of rubbish."""
    odd = [Odd(name) for name in ODD]
    bad_values: list[Any] = [*odd, *hostile(["object", "dict"])]
    ends: list[Any] = [Return(value) for value in bad_values]
    ends += [Raise(Error(kind, "message")) for kind in ERROR_KINDS]
    ends += [Raise(error) for error in hostile(ERROR_BASES)]
    ends += ENDS
    ends += [Raise(Error("ChildTaskError", value)) for value in odd]
    jobs = [Job(f"end {n}", end) for n, end in enumerate(ends)]
    jobs += [Job(f"deed {deed}", Return("done"), [deed]) for deed in DEEDS]
    jobs += [Job(f"input {name}", Return("done"), input=Raw(name)) for name in INPUTS]
    first = Step(input=Odd("bytes"))  # so that the others do not find an empty log
    steps = [[first, Step(input=value)] for value in bad_values]
    steps += [[Step(task_name=Odd(name))] for name in NO_NAMES]
    jobs += [Job(f"steps {n}", Return("done"), s, is_durable=True) for n, s in enumerate(steps)]
    jobs += [Job(f"durable {end}", end, is_durable=True) for end in ENDS]
    return jobs
