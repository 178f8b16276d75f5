"""The lab's server: the page, the stream of what happens, and the actions.

It listens on 127.0.0.1 alone. Whoever asks has to know the token, and no page of another site can
ask in a reader's name: the Host and, for actions, the Origin have to be the lab's own.
"""

import asyncio
import inspect
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psycopg
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    JSONResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from shared.database import without_password
from shared.diff import compare
from shared.lab.errors import LabError
from shared.lab.hand import CONCURRENCY, DURABLE_CONCURRENCY, Hand
from shared.lab.live import Live
from shared.lab.scenes import Player
from shared.lessons import all_lessons, find_lesson
from shared.outages import one_line

STATIC = Path(__file__).parent / "static"
MAX_BODY = 100_000  # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

Action = Callable[..., Awaitable[Any]]

log = logging.getLogger(__name__)


class Guard:
    """Lets only those in who know the token, and come from this machine's own page."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self.app = app
        self.token = token
        self.cookie = f"lab_{port}"  # cookies are for all ports: two labs must not share one
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        if problem := self.problem(request):
            response = JSONResponse({"error": problem}, status_code=403, headers=HEADERS)
            await response(scope, receive, send)
            return
        with suppress(asyncio.CancelledError):  # the lab is closing
            await self.app(scope, receive, send)

    def problem(self, request: Request) -> str | None:
        """Why a request is refused, if it is."""
        if request.headers.get("host") not in self.hosts:
            return "The lab answers to its own address only."
        origins = {f"http://{host}" for host in self.hosts}
        if request.method != "GET" and request.headers.get("origin") not in origins:
            return "Only the lab's own page can do this."
        given = [request.cookies.get(self.cookie), request.headers.get("x-lab-token")]
        if request.url.path == "/":
            given.append(request.query_params.get("token"))
        tokens = [token.encode() for token in given if token]
        if not any(secrets.compare_digest(token, self.token.encode()) for token in tokens):
            return "Open the URL that the lab has printed: it has a token in it."
        return None


class Server(uvicorn.Server):
    """uvicorn, which leaves the signals to the lab."""

    def capture_signals(self) -> Any:
        return nullcontext()


class Lab:
    """What is behind the addresses."""

    def __init__(self, hand: Hand, live: Live, token: str, port: int) -> None:
        self.hand = hand
        self.live = live
        self.player = Player(hand)
        live.extras = self.extras
        self.cookie = f"lab_{port}"
        self.token = token
        self.app = Guard(self.routes(), token, port)
        self.actions: dict[str, Action] = {
            "start_worker": self.start_worker,
            "kill": self.to_worker(hand.kill),
            "freeze": self.to_worker(hand.freeze),
            "thaw": self.to_worker(hand.thaw),
            "stop": self.to_worker(hand.stop),
            "cut_connections": self.to_worker(hand.cut_connections),
            "clear": hand.clear,
            "empty": self.empty,
            "restart_postgres": hand.restart_postgres,
            "enqueue": self.enqueue,
            "retry": self.to_task(hand.retry),
            "replay": self.to_task(hand.replay),
            "fork": self.fork,
            "signal": self.signal,
            "scene": self.player.start,
            "scene_next": self.scene_next,
            "scene_stop": self.player.stop,
        }

    def routes(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/", self.page),
                Route("/api/stream", self.stream),
                Route("/api/diff", self.diff),
                Route("/api/{action}", self.act, methods=["POST"]),
                Mount("/static", StaticFiles(directory=STATIC)),
            ],
        )

    def extras(self) -> dict[str, Any]:
        """What the state says of scenes, and of the other lessons."""
        lessons = [path.name.partition("-") for path in all_lessons()]
        return {
            "lessons": [{"number": number, "name": name} for number, _, name in lessons],
            "scenes": self.player.programme(),
            "scene": self.player.state(),
        }

    async def page(self, request: Request) -> Response:
        response = FileResponse(STATIC / "index.html", headers=HEADERS)
        response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict")
        return response

    async def stream(self, request: Request) -> Response:
        chosen = request.query_params.get("task", "")
        # The browser's own word, after an interruption, or the page's, when it asks anew.
        seen = request.headers.get("last-event-id") or request.query_params.get("seen", "0")
        events = self.live.stream(
            int(chosen) if chosen.isdecimal() else None, int(seen) if seen.isdecimal() else 0
        )
        return StreamingResponse(events, media_type="text/event-stream", headers=HEADERS)

    async def diff(self, request: Request) -> Response:
        try:
            sides = [find_lesson(request.query_params.get(name, "")) for name in ("from", "to")]
            result = await asyncio.to_thread(compare, *sides)
        except SystemExit as error:
            return JSONResponse({"error": str(error)}, status_code=400, headers=HEADERS)
        return JSONResponse(result, headers=HEADERS)

    async def act(self, request: Request) -> Response:
        """Run an action; its arguments are the names and values in the body."""
        name = request.path_params["action"]
        try:
            arguments = await read_object(request)
            if name not in self.actions:
                raise LabError(f"There is no action {name}.")
            try:
                inspect.signature(self.actions[name]).bind(**arguments)
            except TypeError as error:
                raise LabError(f"{name}: {error}.") from None
            result = await self.actions[name](**arguments)
        except LabError as error:
            return JSONResponse({"error": str(error)}, status_code=400, headers=HEADERS)
        except psycopg.Error as error:
            reason = f"The database refuses: {without_password(one_line(error))}"
            return JSONResponse({"error": reason}, status_code=400, headers=HEADERS)
        except Exception as error:
            log.exception("action %s", name)
            what = f"{type(error).__name__}: {without_password(one_line(error))}"
            reason = f"The lab has a fault: {what}. Its terminal says more."
            return JSONResponse({"error": reason}, status_code=500, headers=HEADERS)
        return JSONResponse(result if isinstance(result, dict) else {}, headers=HEADERS)

    async def start_worker(
        self, concurrency: int = CONCURRENCY, durable_concurrency: int = DURABLE_CONCURRENCY
    ) -> dict[str, str]:
        return {"key": await self.hand.start_worker(None, concurrency, durable_concurrency)}

    async def enqueue(self, kind: str = "order", count: int = 1) -> dict[str, Any]:
        ids = await self.hand.enqueue(kind, count)
        return {"first": ids[0], "last": ids[-1]}

    async def empty(self) -> None:
        await self.player.stop()
        await self.hand.empty()

    async def fork(self, task: int, event: int) -> None:
        await self.hand.fork(task, event)

    async def signal(self, task: int, name: str, payload: Any = None) -> None:
        await self.hand.send_signal(task, name, payload)

    async def scene_next(self, answer: str | None = None) -> None:
        await self.player.next(answer)

    def to_worker(self, method: Callable[[str], Awaitable[None]]) -> Action:
        async def action(worker: str) -> None:
            await method(worker)

        return action

    def to_task(self, method: Callable[[int], Awaitable[None]]) -> Action:
        async def action(task: int) -> None:
            await method(task)

        return action


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in a request's body; raises LabError if it is none."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise LabError("That is too long.")
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise LabError("The body is not JSON.") from None
    if not isinstance(value, dict):
        raise LabError("The body is not a JSON object.")
    return value
