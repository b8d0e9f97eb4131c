"""Who may use the server: the host name and the key of every request are checked here."""

import hmac
from collections.abc import Sequence
from typing import Any

from slam_jax.serving.server.refusals import Refused, to_response

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine that only its own programs can mean."""

_OPEN_PATHS = ("/health",)


class Guard:
    """Refuses a foreign host name or a wrong key before the request is read.

    key: what clients send as "Authorization: Bearer KEY"; None = no key. hosts: names that clients
    may know this machine by; None = any. A foreign name may resolve to this machine (DNS
    rebinding), and its pages must not use this server; they know no key.
    """

    def __init__(self, app: Any, key: str | None, hosts: Sequence[str] | None):
        self._app, self._hosts = app, hosts
        self._key = None if key is None else b"Bearer " + key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self._app
        if scope["type"] == "http":
            try:
                self._check(scope["path"], dict(scope["headers"]))
            except Refused as error:
                app = to_response(error)
        await app(scope, receive, send)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._hosts is not None:
            name = host_of(headers.get(b"host", b"").decode("latin-1"))
            if name not in self._hosts:
                raise Refused(f"this server is not {name[:80]!r}", status=403, close=True)
        if self._key is None or path in _OPEN_PATHS:
            return
        # Compared in constant time: how long it takes tells nothing about the key.
        if not hmac.compare_digest(headers.get(b"authorization", b""), self._key):
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            raise Refused(message, status=401, code="invalid_api_key", close=True)


def host_of(header: str) -> str:
    """The name in a Host header, without its port."""
    name, _, port = header.rpartition(":")
    return (name if port.isdecimal() else header).strip("[]").lower()
