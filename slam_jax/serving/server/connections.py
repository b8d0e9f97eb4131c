"""Connections: how many, how long they may be idle, and how the server stops."""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from slam_jax.errors import InputError
from slam_jax.runtime.signals import SIGNALS, print_line
from slam_jax.serving.server.guard import LOOPBACK
from slam_jax.serving.server.limits import Limits

_OWN_FILES = 256  # open files that are no connections
_UNREAD = 1 << 16  # bytes of an answer in the kernel
_SAME_EVENT_S = 1.0  # a closing terminal sends SIGHUP twice


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; names but "localhost" count as no."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket; 0 = any port that is free.

    Raises InputError where there is no such address, or the port is taken or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # Bounds the kernel's memory for what the client of a connection has not read.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD)
        return listener
    except OSError as error:
        raise InputError(
            f"{host} port {port}: {error.strerror}; give others with --host and --port, or "
            "--port=0 for any that is free"
        ) from error


def address_of(listener: socket.socket) -> str:
    """Such as "http://127.0.0.1:8000"."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def hosts_of(listener: socket.socket) -> tuple[str, ...]:
    """The names by which programs of this machine may call a server without a key."""
    return (*LOOPBACK, listener.getsockname()[0])


def serve(app: Any, listener: socket.socket, engine: Any, limits: Limits) -> None:
    """Serves until SIGTERM, Ctrl-C or SIGHUP; then what is being answered is finished first.

    A second signal ends it at once, and so does `limits.stop_time`.
    """
    server = make_server(app, engine, limits)
    asyncio.run(server.serve([listener]))


def make_server(app: Any, engine: Any, limits: Limits) -> "Server":
    most = min(limits.connections, _allow_files(limits.connections + _OWN_FILES) - _OWN_FILES)
    config = uvicorn.Config(
        app,
        http=connection_class(limits, most),
        ws="none",
        lifespan="off",
        # It must be the loop whose transports the limits were tested with.
        loop="asyncio",
        log_level="error",
        access_log=False,
        server_header=False,
        backlog=2048,
        timeout_graceful_shutdown=int(limits.stop_time) + 2,
    )
    return Server(config, engine, limits)


def _allow_files(wanted: int) -> int:
    """Raises this process's limit of open files where it may; returns the limit."""
    try:
        import resource
    except ImportError:  # not on Windows, which has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        return allowed
    return soft


class Server(uvicorn.Server):
    """A server that finishes the answers in progress, and exits with 0, when asked to stop."""

    def __init__(self, config: uvicorn.Config, engine: Any, limits: Limits):
        super().__init__(config)
        # A second signal cancels what is being answered, which is no error.
        logging.getLogger("uvicorn.error").addFilter(_is_error)
        self._engine, self._limits, self._asked = engine, limits, None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # In the tests the server is in another thread, where signals cannot be received.
        numbers = [n for n in SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked, self.should_exit = now, True
            name = signal.Signals(sig).name
            print_line(f"{name}: finishing the answers in progress; send it again to end at once")
        elif now - self._asked > _SAME_EVENT_S:
            self.force_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No new connections; then, after `stop_time`, whoever still waits is told so."""
        loop = asyncio.get_running_loop()

        def give_up() -> None:
            loop.run_in_executor(None, lambda: self._engine.close(drain=False))

        timer = loop.call_later(self._limits.stop_time, give_up)
        await super().shutdown(sockets)
        timer.cancel()
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # its client reads nothing
        await asyncio.sleep(0.01)  # the loop closes them


def _is_error(record: logging.LogRecord) -> bool:
    kind = record.exc_info[0] if record.exc_info else None
    late = isinstance(record.msg, str) and record.msg.startswith("Cancel %s running task(s)")
    return not late and (kind is None or not issubclass(kind, asyncio.CancelledError))


def connection_class(limits: Limits, most: int) -> type[H11Protocol]:
    """The class of connections, of which at most `most` are open."""
    return type("_Connection", (_Connection,), dict(limits=limits, most=most, idle={}))


class _Connection(H11Protocol):
    """A connection that is closed where its client neither asks nor reads."""

    limits: Limits
    most: int
    idle: dict[Any, None]  # of all connections; the longest idle one is first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle_timer = self._stall_timer = None
        self._rest()
        if len(self.connections) > self.most:
            next(iter(self.idle))._drop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wake()
        self.resume_writing()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._wake()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not self.transport.is_closing():
            self._rest()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.limits.stall_time, self._drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _rest(self) -> None:
        """From now on a whole request head has to arrive, or its body to end, in time."""
        self._wake()
        self.idle[self] = None
        self._idle_timer = self.loop.call_later(self.limits.idle_time, self._drop)

    def _wake(self) -> None:
        self.idle.pop(self, None)
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _drop(self) -> None:
        """Ends the connection without waiting for the client to read what was sent."""
        self._wake()
        self.transport.abort()
