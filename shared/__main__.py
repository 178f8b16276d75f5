"""Tools to look at the lessons and their database, and to send a signal.

python -m shared lab [NN | PATH] [--port P] [--no-browser]
                                         a page on which a lesson runs, and can be hurt
python -m shared diff NN NN              two lessons side by side; each a number or a path
python -m shared psql [NN] [ARGUMENTS]   psql, in the schema of lesson NN; ARGUMENTS are psql's own
python -m shared watch NN                tasks, workers, events, signals of lesson NN as they change
python -m shared signal NN TASK_ID NAME [JSON]
                                         send a signal; without JSON its payload is null
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
from importlib.util import find_spec

from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo

from shared.database import conninfo
from shared.diff import show
from shared.embedded import programs
from shared.lessons import find_lesson
from shared.runtime import hangup, run, set_up_logging, writing_to_stdout
from shared.send import send
from shared.watch import watch

# What ends psql, and so this program, which has the embedded Postgres to stop.
ENDING = [signal.SIGTERM, *hangup()]


def psql(schema: str, arguments: list[str]) -> int:
    """Run psql on the lessons' database; return its exit status."""
    set_up_logging()  # the creation of the embedded Postgres takes a while
    for number in ENDING:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    # In the environment, since everybody can read the command line, and so a password in it.
    settings = conninfo_to_dict(conninfo(schema))
    # Who types may think, in the middle of a transaction, for as long as they like.
    settings["options"] = f"{settings['options']} -c idle_in_transaction_session_timeout=0"
    variables = {
        option.envvar.decode(): str(settings[option.keyword.decode()])
        for option in Conninfo.get_defaults()
        if option.envvar and option.keyword.decode() in settings
    }
    program = shutil.which("psql") or programs() / "psql"
    # Ctrl-C is for psql, which cancels a query with it and would inherit SIG_IGN.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    with subprocess.Popen([program, *arguments], env=os.environ | variables) as process:
        for number in ENDING:
            signal.signal(number, lambda number, frame: process.send_signal(number))
        # Without a timeout a signal that comes just before would be seen only when psql has ended.
        status = process.wait(timeout=threading.TIMEOUT_MAX)
    return status if status >= 0 else 128 - status


def open_lab(arguments: list[str]) -> None:
    """Run the lab, if its packages are there."""
    parser = argparse.ArgumentParser(prog="python -m shared lab")
    parser.add_argument("lesson", nargs="?", default="07", help="a number, or a path to a copy")
    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    parser.add_argument("--no-browser", action="store_true", help="only print the page's URL")
    options = parser.parse_args(arguments)
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"The lab needs {' and '.join(missing)}. Install what it needs with "
            "`python -m pip install -e '.[lab]'`."
        )
    from shared.lab.program import lab

    run(lab(find_lesson(options.lesson), options.port, not options.no_browser))


def lesson_schema(number: str) -> str:
    """The schema of the lesson with this number, however many digits it is written with."""
    return f"lesson_{int(number):02}"


def main(arguments: list[str]) -> None:
    match arguments:
        case ["psql", number, *rest] if number.isdecimal():
            sys.exit(psql(lesson_schema(number), rest))
        case ["psql", *rest]:
            sys.exit(psql("public", rest))
        case ["watch", number] if number.isdecimal():
            run(watch(lesson_schema(number)))
        case ["lab", *rest]:
            open_lab(rest)
        case ["diff", old, new]:
            with writing_to_stdout():
                show(find_lesson(old), find_lesson(new))
        case ["signal", number, task_id, name, *payload] if number.isdecimal() and not payload[1:]:
            run(send(number, task_id, name, *payload or ["null"]))
        case _:
            sys.exit(__doc__ or "How to call it is in shared/README.md.")  # with python -OO


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
