"""The command line of peers.py, and who takes part."""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from psycopg.conninfo import conninfo_to_dict

from benchmarks import report, scaled
from benchmarks.stage import database
from lesson_loader import all_lessons, lesson_number

TESTS = Path(__file__).parents[2]
ROUNDS = 3
LIMIT = 300  # seconds for one measurement

Book = defaultdict[str, defaultdict[str, list[float]]]


@dataclass
class Peer:
    """Who runs, how, and how many tasks and orders, so that it takes a second or two."""

    module: str
    variant: str
    package: str
    noops: int
    orders: int = 0  # none for those that have no steps


def peers() -> dict[str, Peer]:
    """All who take part, by the name that the table gives them."""
    by_number = {lesson_number(path): path for path in all_lessons()}
    last = max(by_number)
    ours = {f"lesson {number:02}": by_number[number] for number in sorted({7, last})}
    times = 4 if last >= 16 else 1
    found = {
        name: Peer("lesson", str(path), "psycopg", times * 5000, times * 800)
        for name, path in ours.items()
    }
    return found | {
        "pgqueuer, its defaults": Peer("pgqueuer", "10", "pgqueuer", 10_000),
        "pgqueuer, batches of 50": Peer("pgqueuer", "50", "pgqueuer", 20_000),
        "procrastinate, 100 at once": Peer("procrastinate", "100", "procrastinate", 1500),
        "absurd, 1 client, 100 at once": Peer("absurd", "1x100", "absurd-sdk", 2000, 800),
        "absurd, 10 clients, 10 at once": Peer("absurd", "10x10", "absurd-sdk", 2000, 800),
        "DBOS, a queue without limit": Peer("dbos", "1", "dbos", 2000, 500),
    }


def measure(peer: Peer, kind: str, count: int) -> float:
    """Let one process do it, in a database of its own; return how many a second it did."""
    command = [sys.executable, "-m", f"benchmarks.peer.{peer.module}", kind, str(count)]
    with database():
        # Not on the command line, which everybody can read: it may have a password.
        environment = os.environ | {"PYTHONPATH": str(TESTS), "PEER_URL": peer_url()}
        result = subprocess.run(
            [*command, peer.variant],
            env=environment,
            stdout=subprocess.PIPE,
            timeout=LIMIT,
            check=True,
            text=True,
        )
    return float(result.stdout)


def peer_url() -> str:
    """DATABASE_URL in the form that all of them take."""
    settings = conninfo_to_dict(os.environ["DATABASE_URL"])
    user, password, host, port, name = (
        quote(str(settings.get(part) or ""), safe="")
        for part in ("user", "password", "host", "port", "dbname")
    )
    return f"postgresql://{user}:{password}@/{name}?host={host}&port={port}"


def installed(package: str) -> str | None:
    """The version of a package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds in which each has its turn. Who cannot be measured is left out."""
    chosen = {
        name: peer
        for name, peer in peers().items()
        if not options.only or any(part in name for part in options.only)
    }
    versions = {peer.package: installed(peer.package) for peer in chosen.values()}
    left_out = {
        name: f"{peer.package} is not installed"
        for name, peer in chosen.items()
        if versions[peer.package] is None
    }
    book: Book = defaultdict(lambda: defaultdict(list))
    about = report.machine()
    for number in range(1, options.rounds + 1):
        print(f"round {number} of {options.rounds}", file=sys.stderr)
        for name, peer in chosen.items():
            if name in left_out:
                continue
            try:
                book[name]["noop_per_s"].append(measure(peer, "noop", scaled(peer.noops)))
                if peer.orders:
                    book[name]["orders_per_s"].append(measure(peer, "order", scaled(peer.orders)))
            except subprocess.CalledProcessError:
                left_out[name] = "it failed"
            except subprocess.TimeoutExpired:
                left_out[name] = f"it took more than {LIMIT} s"
    for name, why in left_out.items():
        print(f"{name}: left out, {why}", file=sys.stderr)
        book.pop(name, None)
    return {"about": about, "versions": versions, "peers": figures(book), "left_out": left_out}


def figures(book: Book) -> dict[str, dict[str, float]]:
    """Medians, minima and maxima, and how many times as fast the last lesson was, by round."""
    found: dict[str, dict[str, float]] = {}
    last = max((name for name in book if name.startswith("lesson ")), default="")
    for name, rates in book.items():
        found[name] = {}
        for figure, values in rates.items():
            found[name].update(report.summary(figure, values))
            if last and name != last:
                times = report.divided(book[last][figure], values)
                found[name].update(report.summary(figure.replace("_per_s", "_times"), times))
    return found


def main(description: str | None) -> None:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to it")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"{ROUNDS} if not")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="those whose names have this")
    options = parser.parse_args()
    with database():
        found = measure_all(options)
    print("each figure: median, and below it minimum-maximum; times: the last lesson's by theirs")
    report.show("peers", found["peers"], by_rows=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
