"""The application: its paths, and the way of a request through the engine and back."""

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from slam_jax.errors import UserError
from slam_jax.serving import Engine, EngineClosed, Event, QueueFull, Ticket
from slam_jax.serving.server.bodies import Bodies, Body, Gone
from slam_jax.serving.server.calls import Call, as_constraint, read_chat, read_completion
from slam_jax.serving.server.fields import parse_json
from slam_jax.serving.server.guard import Guard
from slam_jax.serving.server.metrics import CONTENT_TYPE, Metrics
from slam_jax.serving.server.refusals import JSON, Refused, error_body, to_bytes, to_response
from slam_jax.serving.server.replies import Reply, server_sent
from slam_jax.serving.server.served import Served

_CHAT, _COMPLETION, _MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
_HEALTH, _METRICS = "/health", "/metrics"
_PATHS = (_CHAT, _COMPLETION, _MODELS, _HEALTH, _METRICS)
_READERS = 2  # requests that are decoded at once: a picture may need half a gigabyte for a moment
_RETRY_S = 2


def make_app(
    engine: Engine, served: Served, *, key: str | None = None, hosts: Sequence[str] | None = None
) -> Starlette:
    """The application; `slam_jax.serving.server.connections.serve` serves it.

    key, hosts: as in `Guard`.
    """
    metrics, started = Metrics(), int(time.time())
    model = {"id": served.name, "object": "model", "created": started, "owned_by": "slam_jax"}

    async def show_models(request: Request) -> Response:
        return _json({"object": "list", "data": [model]})

    async def show_model(request: Request) -> Response:
        if request.path_params["name"] != served.name:
            message = f"there is no such model; this server has {served.name!r}"
            raise Refused(message, "model", status=404, code="model_not_found")
        return _json(model)

    async def show_health(request: Request) -> Response:
        broken = engine.stats().broken
        return _json({"status": "broken" if broken else "ok"}, 503 if broken else 200)

    async def show_metrics(request: Request) -> Response:
        text = metrics.to_text(engine.stats())
        return Response(text, headers={"content-type": CONTENT_TYPE})

    bodies, readers = Bodies(served.limits), ThreadPoolExecutor(_READERS, "read")
    answer = functools.partial(_Answer, engine, served, metrics, bodies, readers)
    routes = [
        Route(_CHAT, answer(read_chat), methods=["POST"]),
        Route(_COMPLETION, answer(read_completion), methods=["POST"]),
        Route(_MODELS, show_models),
        Route(_MODELS + "/{name:path}", show_model),
        Route(_HEALTH, show_health),
        Route(_METRICS, show_metrics),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(_Count, metrics), Middleware(Guard, key, hosts)],
        exception_handlers={Refused: _refuse, HTTPException: _refuse_path, Exception: _fail},
    )


class _Answer:
    """One of the two paths that answer; an ASGI application."""

    def __init__(
        self,
        engine: Engine,
        served: Served,
        metrics: Metrics,
        bodies: Bodies,
        readers: ThreadPoolExecutor,
        read: Callable[[dict[str, Any], Served], Call],
    ):
        self._engine, self._served, self._metrics = engine, served, metrics
        self._bodies, self._readers, self._read = bodies, readers, read

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        started, body, tickets = time.perf_counter(), Body(self._bodies), _Tickets()
        # Whoever is gone needs no reply; what was computed for it stops.
        with contextlib.suppress(Gone):
            try:
                await body.receive(scope, receive, self._served.most_bytes)
                await _unless_gone(receive, self._answer(body, tickets, send, started))
            finally:
                body.release()
                tickets.close()

    async def _answer(self, body: Body, tickets: "_Tickets", send: Any, started: float) -> None:
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(prompt: int, event: Event) -> None:  # from the engine's thread
            loop.call_soon_threadsafe(events.put_nowait, (prompt, event))

        submit = functools.partial(self._submit, body.take(), tickets, deliver, started)
        call, reply = await loop.run_in_executor(self._readers, submit)
        body.release()
        first = await self._next(events)
        if first[1].finish == "timeout" and not first[1].tokens:
            raise self._too_late()
        self._metrics.first_token.observe(time.perf_counter() - started)
        if call.stream:
            await self._stream(reply, first, events, send)
        else:
            reply.add(*first)
            while not reply.done:
                reply.add(*await self._next(events))
            response = Response(to_bytes(reply.whole()), headers=JSON)
            await response({"type": "http"}, _receive_nothing, send)
        self._metrics.answer.observe(time.perf_counter() - started)

    def _submit(
        self,
        body: bytes,
        tickets: "_Tickets",
        deliver: Callable[[int, Event], None],
        started: float,
    ) -> tuple[Call, Reply]:
        """Reads the request and hands it to the engine; in a thread of its own, for which it may
        have waited. Raises Gone if the client is gone before all of it was handed over."""
        end = started + self._served.limits.answer_time
        if time.perf_counter() > end:
            raise self._too_late()
        call = self._read(parse_json(body), self._served)
        try:
            constraint = as_constraint(self._served.loaded, call.constraint)
            for i, request in enumerate(call.requests):
                if tickets.closed:  # reading the pictures of the others would be in vain
                    raise Gone
                ticket = self._engine.submit(
                    request,
                    call.sampling,
                    constraint=constraint,
                    num_top=call.num_top or 0,
                    on_event=functools.partial(deliver, i),
                    deadline=end - time.perf_counter(),
                )
                tickets.add(ticket)
        except QueueFull as error:
            raise Refused(str(error), status=429, code="busy", retry_after=_RETRY_S) from None
        except EngineClosed as error:
            code = "broken" if self._engine.stats().broken else "stopping"
            raise Refused(str(error), status=503, code=code) from None
        except UserError as error:
            message = str(error).replace("max_new_tokens", "max_tokens")
            raise Refused(message, code="invalid_input") from None
        return call, Reply(call, self._served, tickets.all)

    def _too_late(self) -> Refused:
        message = f"the answer did not begin within {self._served.limits.answer_time:g} seconds"
        return Refused(message, status=429, code="busy", retry_after=_RETRY_S)

    async def _next(self, events: asyncio.Queue) -> tuple[int, Event]:
        """The next event; raises Refused where an answer failed."""
        prompt, event = await events.get()
        if event.finish == "error":
            raise Refused(f"the answer failed: {event.error}", status=500, code="failed")
        if event.finish == "cancelled":
            raise Refused("the server is stopping", status=503, code="stopping", retry_after=5)
        return prompt, event

    async def _stream(
        self, reply: Reply, first: tuple[int, Event], events: asyncio.Queue, send: Any
    ) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def write(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            following = first
            while True:
                if piece := reply.add(*following):
                    await write(server_sent(piece))
                if reply.done:
                    break
                following = await self._next(events)
        except Refused as error:
            return await write(server_sent(error.to_json()), more=False)
        if piece := reply.last():
            await write(server_sent(piece))
        await write(b"data: [DONE]\n\n", more=False)


class _Tickets:
    """The tickets of a call, which a thread adds and the event loop cancels."""

    def __init__(self):
        self._tickets: list[Ticket] = []
        self._lock, self._closed = threading.Lock(), False

    def add(self, ticket: Ticket) -> None:
        with self._lock:
            self._tickets.append(ticket)
            if self._closed:
                ticket.cancel()

    def close(self) -> None:
        """Cancels what is not finished, now and later."""
        with self._lock:
            self._closed = True
            for ticket in self._tickets:
                ticket.cancel()

    @property
    def closed(self) -> bool:
        with self._lock:
            return self._closed

    @property
    def all(self) -> list[Ticket]:
        with self._lock:
            return list(self._tickets)


async def _unless_gone(receive: Any, work: Coroutine[Any, Any, None]) -> None:
    """Does the work; raises Gone, and stops it, as soon as the client is gone."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    worker, watcher = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise Gone
        worker.result()
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


class _Count:
    """Counts responses by path and status."""

    def __init__(self, app: Any, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def count(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in _PATHS else "other"
                self._metrics.responses[path, message["status"]] += 1
            await send(message)

        await self._app(scope, receive, count)


def _json(value: Any, status: int = 200, headers: Any = None) -> Response:
    return Response(to_bytes(value), status, headers={**JSON, **(headers or {})})


async def _refuse(request: Request, error: Any) -> Response:
    return to_response(error)


async def _refuse_path(request: Request, error: Any) -> Response:
    """There is no such path, or it has another method."""
    message = f"{error.detail}: {request.method} {request.scope['path'][:80]}"
    return _json(error_body(message, error.status_code), error.status_code, error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    # Starlette raises the error once more, so that its traceback is in the log.
    return _json(error_body("internal error; see the server's log", 500), 500)


async def _receive_nothing() -> Any:
    raise RuntimeError("a whole response reads nothing")
