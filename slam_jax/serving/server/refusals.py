"""Requests that get an error, in the form that OpenAI's clients read."""

import json
from typing import Any

from starlette.responses import Response

JSON = {"content-type": "application/json"}


class Refused(Exception):
    """A request that gets an error instead of an answer.

    param: the field that is wrong. code: a short name for programs. retry_after: seconds after
    which the same request may succeed.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code
        self.retry_after, self.close = retry_after, close

    def to_json(self) -> dict[str, Any]:
        return error_body(str(self), self.status, self.param, self.code)

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        # What is left of the request's body is not read.
        return {**headers, "connection": "close"} if self.close else headers


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error, as OpenAI's API reference has it under "Errors"."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def to_bytes(value: Any) -> bytes:
    # ASCII: half a letter, which a client may have sent, has no form in UTF-8.
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def to_response(error: Refused) -> Response:
    return Response(to_bytes(error.to_json()), error.status, headers={**JSON, **error.headers})
