"""The lab in a process of its own, as a reader starts it, and a page that looks at it."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse
from typing import Any
from urllib.error import HTTPError

DEADLINE = 60.0  # seconds; generous, since it is only ever reached by a test that fails
# Quick, but not so that a worker on a busy machine is taken for dead.
QUICK = {"HEARTBEAT_INTERVAL": 0.1, "INACTIVE_AFTER": 3.5}


class Refused(Exception):
    """The lab's answer to what it does not do: status and error."""


class Page:
    """One connection to the stream, as a tab has one."""

    def __init__(self, response: HTTPResponse) -> None:
        self.response = response
        self.states: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        threading.Thread(target=self.read, daemon=True).start()
        self.until(lambda: self.states, "there is a state")

    def read(self) -> None:
        event = ""
        with suppress(OSError, ValueError):  # the lab has ended
            for raw in self.response:
                name, _, value = raw.decode().rstrip("\n").partition(": ")
                if name == "event":
                    event = value
                elif name == "data":
                    data = json.loads(value)
                    if event == "state":
                        self.states.append(data)
                    else:
                        self.log += data

    @property
    def state(self) -> dict[str, Any]:
        return self.states[-1]

    def worker(self, key: str) -> dict[str, Any]:
        """What the page says of a worker; empty if nothing."""
        return next((each for each in self.state["workers"] if each["key"] == key), {})

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until the page shows it."""
        deadline = time.monotonic() + DEADLINE
        while not (value := condition()):
            assert time.monotonic() < deadline, f"waited in vain until {what}: {self.states[-1:]}"
            time.sleep(0.02)
        return value


class LabProcess:
    """A lab that runs."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.address, self.token = url.split("/?token=")

    def request(self, path: str, data: bytes | None = None, **headers: str) -> HTTPResponse:
        """A request with these headers alone; raises Refused."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.address + path, data, names)
        try:
            response: HTTPResponse = urllib.request.urlopen(request, timeout=DEADLINE)
        except HTTPError as error:
            raise Refused(error.code, json.load(error)["error"]) from None
        return response

    def get(self, path: str) -> Any:
        with self.request(path, x_lab_token=self.token) as response:
            return json.load(response)

    def do(self, action: str, **arguments: Any) -> Any:
        """What a button of the page does; raises Refused."""
        data = json.dumps(arguments).encode()
        headers = {"x_lab_token": self.token, "origin": self.address}
        with self.request(f"/api/{action}", data, **headers) as response:
            return json.load(response)

    def open_page(self, task: int | None = None) -> Page:
        path = "/api/stream" + (f"?task={task}" if task else "")
        return Page(self.request(path, x_lab_token=self.token))


@contextmanager
def open_lab(*arguments: Any, code: str | None = None, **settings: float) -> Iterator[LabProcess]:
    """Run the lab on a lesson within this block; `code` is run in place of `python -m shared`."""
    program = ["-c", code] if code else ["-m", "shared"]
    process = subprocess.Popen(
        [sys.executable, *program, "lab", "--no-browser", *map(str, arguments)],
        env=os.environ | {"LAB_SETTINGS": json.dumps(QUICK | settings)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://\S+", line)
        assert match, f"the lab did not start: {line!r}"
        yield LabProcess(process, match[0])
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
