"""The same statements driven by pgbench, where there is one: how much of the floor is Python."""

import asyncio
import os
import re
import shutil
import tempfile
from asyncio.subprocess import PIPE
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo

from benchmarks import CONNECTIONS, QUEUE, SLOTS
from benchmarks.stage import Stage
from shared.database import conninfo
from shared.embedded import programs
from shared.schema import schema_name

# Each client completes a share of the ids, one after the other.
NEXT_ID = r"""
\set n :n + 1
\set id :client_id * :share + :n
"""


async def pgbench(stage: Stage, tasks: int) -> float | None:
    """Claim in batches, then complete one by one; tasks a second. None if there is no pgbench.

    It has no loop over what a claim has returned, so the claims come first, on one connection. For
    the statements of lessons 02 and 03, which know no owner.
    """
    program = shutil.which("pgbench", path=f"{programs()}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return None
    share = -(-tasks // CONNECTIONS)
    batches = -(-tasks // SLOTS)
    claim, complete = stage.queries.poll_tasks.sql, stage.queries.complete_task.sql
    variables: dict[str, object] = {"queue": QUEUE, "task_names": "{noop}", "limit": SLOTS}
    claims_per_s = await tps(program, stage, claim, 1, batches, variables)
    variables = {"n": 0, "share": share, "output": "null"}
    completions_per_s = await tps(program, stage, NEXT_ID + complete, CONNECTIONS, share, variables)
    return 1 / (1 / (claims_per_s * SLOTS) + 1 / completions_per_s)


async def tps(
    program: str,
    stage: Stage,
    sql: str,
    clients: int,
    transactions: int,
    variables: dict[str, object],
) -> float:
    """Let each client run a script so many times; return how often it was run in a second."""
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory) / "script.sql"
        script.write_text(re.sub(r"%\((\w+)\)s", r":\1", sql), encoding="utf-8")
        options = [f"-D{name}={value}" for name, value in variables.items()]
        options += ["-n", "-Mprepared", f"-c{clients}", f"-t{transactions}", f"-f{script}"]
        environment = os.environ | connection_variables(schema_name(stage.path))
        process = await asyncio.create_subprocess_exec(
            program, *options, env=environment, stdout=PIPE, stderr=PIPE
        )
        output, errors = (text.decode() for text in await process.communicate())
    found = re.search(r"^tps = ([\d.]+)", output, re.MULTILINE)
    if process.returncode or not found:
        raise SystemExit(f"pgbench: {errors.strip() or output.strip()}")
    return float(found[1])


def connection_variables(schema: str) -> dict[str, str]:
    """Where the database is, for a program of Postgres; everybody can read its command line."""
    settings = conninfo_to_dict(conninfo(schema))
    return {
        option.envvar.decode(): str(settings[option.keyword.decode()])
        for option in Conninfo.get_defaults()
        if option.envvar and option.keyword.decode() in settings
    }
