"""A relay in front of Postgres that does what connection poolers do."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal

from psycopg.conninfo import conninfo_to_dict, make_conninfo

# Every client has a session of the server's; so it has, but its startup parameter `options` is left
# out; all clients have one session by turns, each for a transaction.
Mode = Literal["session", "session without options", "transaction"]

NO_TLS = (80877103, 80877104)  # the codes by which a client asks for it, or for GSS


@dataclass
class Stream:
    """One side of the relay, read message by message."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def startup(self) -> bytes:
        """The first message of a client, without its length."""
        while True:
            (length,) = struct.unpack("!i", await self.reader.readexactly(4))
            body = await self.reader.readexactly(length - 4)
            if struct.unpack("!i", body[:4])[0] not in NO_TLS:
                return body
            self.writer.write(b"N")

    async def message(self) -> bytes:
        """Any later message: a letter, its length, the rest."""
        head = await self.reader.readexactly(5)
        return head + await self.reader.readexactly(struct.unpack("!i", head[1:])[0] - 4)


@dataclass
class Session:
    """A session of the server's, and what the server has said at its beginning."""

    server: Stream
    greeting: bytes = b""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def log_in(self, client: Stream, startup: bytes) -> None:
        self.server.writer.write(struct.pack("!i", len(startup) + 4) + startup)
        kept = [b"R" + struct.pack("!ii", 8, 0)]  # needs no password
        answer = b""
        while answer[:1] != b"Z":
            answer = await self.server.message()
            if answer[:1] == b"K":  # a process id and a secret, which poolers invent
                answer = answer[:5] + b"\x7f" + answer[6:]
            client.writer.write(answer)
            if answer[:1] != b"R":
                kept.append(answer)
            elif answer[5:9] not in (b"\0\0\0\0", b"\0\0\0\x0c"):
                self.server.writer.write(await client.message())  # its password, or a proof of it
        self.greeting = b"".join(kept)

    async def transaction(self, client: Stream, request: bytes) -> None:
        """Pass on a transaction, of which this is the first message."""
        async with self.turn:
            while True:
                self.server.writer.write(request)
                while request[:1] not in (b"Q", b"S"):  # more belongs to it
                    request = await client.message()
                    self.server.writer.write(request)
                answer = b""
                while answer[:1] != b"Z":
                    answer = await self.server.message()
                    client.writer.write(answer)
                if answer[-1:] == b"I":
                    return
                request = await client.message()


class Relay:
    def __init__(self, url: str, mode: Mode) -> None:
        self.address = conninfo_to_dict(url)
        self.mode = mode
        self.serving: set[asyncio.Task[None]] = set()
        self.sessions: list[Session] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        with suppress(OSError, asyncio.IncompleteReadError):
            await self.serve_client(Stream(reader, writer))
        writer.close()

    async def serve_client(self, client: Stream) -> None:
        startup = await client.startup()
        if self.mode == "session without options":
            words = startup[4:].split(b"\0")
            pairs = zip(words[::2], words[1::2], strict=False)
            kept = [name + b"\0" + value for name, value in pairs if name not in (b"", b"options")]
            startup = startup[:4] + b"\0".join(kept) + b"\0\0"
        if self.mode == "transaction" and self.sessions:
            session = self.sessions[0]
            client.writer.write(session.greeting)
        else:
            session = Session(await self.connect())
            self.sessions.append(session)
            await session.log_in(client, startup)
        while (request := await client.message())[:1] != b"X":
            await session.transaction(client, request)

    async def connect(self) -> Stream:
        host, port = str(self.address.get("host") or "localhost"), self.address.get("port", 5432)
        if host.startswith("/"):
            return Stream(*await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}"))
        return Stream(*await asyncio.open_connection(host, int(str(port))))


@asynccontextmanager
async def relay(url: str, mode: Mode) -> AsyncIterator[str]:
    """The connection string that leads to `url` through a relay, which runs within this block."""
    relay = Relay(url, mode)
    listener = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    no_tls = {"sslmode": "disable", "gssencmode": "disable"}
    try:
        yield make_conninfo(url, host="127.0.0.1", port=port, **no_tls)
    finally:
        listener.close()
        for task in relay.serving:
            task.cancel()
        await asyncio.gather(*relay.serving, return_exceptions=True)
        for session in relay.sessions:
            session.server.writer.close()
