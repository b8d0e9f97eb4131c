"""Receiving the bodies of requests within bounds of size, time and memory."""

import asyncio
from typing import Any, NoReturn

from slam_jax.serving.server.limits import Limits
from slam_jax.serving.server.refusals import Refused

_MOST_DISCARDED = 4  # times the largest body


class Gone(Exception):
    """The client closed the connection."""


class Bodies:
    """The memory that bodies take which are being received or wait to be read."""

    def __init__(self, limits: Limits):
        self.limits, self.held = limits, 0


class Body:
    """The body of one request; `release` gives its memory back."""

    def __init__(self, bodies: Bodies):
        self._bodies, self._data = bodies, bytearray()

    def take(self) -> bytes:
        """The bytes; they are counted until `release`."""
        return bytes(self._data)

    def release(self) -> None:
        self._bodies.held -= len(self._data)
        self._data = bytearray()

    async def receive(self, scope: Any, receive: Any, most: int) -> None:
        """Reads the whole body of at most `most` bytes.

        Raises Refused for a body that is too large or too slow or is no JSON by its headers, and
        Gone where the client leaves.
        """
        headers = dict(scope["headers"])
        _check_type(headers)
        try:
            async with asyncio.timeout(self._bodies.limits.read_time):
                length = headers.get(b"content-length", b"0")
                if int(length) > most:  # h11 has checked that it is a number
                    await _refuse_size(receive, most, more=True)
                while await self._receive_piece(receive, most):
                    pass
        except TimeoutError:
            message = f"the body did not arrive within {self._bodies.limits.read_time:g} seconds"
            raise Refused(message, status=408, close=True) from None

    async def _receive_piece(self, receive: Any, most: int) -> bool:
        """Whether there is more."""
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        piece = message.get("body", b"")
        if len(self._data) + len(piece) > most:
            await _refuse_size(receive, most, more=message.get("more_body", False))
        if self._bodies.held + len(piece) > self._bodies.limits.bodies:
            message = "the server is receiving too much at once; try again"
            raise Refused(message, status=429, code="busy", retry_after=2, close=True)
        self._bodies.held += len(piece)
        self._data += piece
        return message.get("more_body", False)


def _check_type(headers: dict[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    # A page of another site may post any other type without asking this server first.
    if kind != "application/json":
        message = "send JSON with the header Content-Type: application/json"
        raise Refused(message, status=415, close=True)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refused("compressed bodies are not read; send it plain", status=415, close=True)


async def _refuse_size(receive: Any, most: int, *, more: bool) -> NoReturn:
    """A client reads no answer while it sends; so some of what it sends is discarded first.

    more: whether there is something that was not received yet.
    """
    discarded = 0
    while more and discarded < _MOST_DISCARDED * most:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        discarded += len(message.get("body", b""))
        more = message.get("more_body", False)
    raise Refused(
        f"the body is too large; at most {most:,} bytes are read",
        status=413,
        code="too_large",
        close=True,
    )
