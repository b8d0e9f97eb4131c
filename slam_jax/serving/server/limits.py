"""What one client may ask of the server, so that the others are served meanwhile."""

import dataclasses

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of requests and connections; times in seconds.

    body: bytes of a request, where the model reads pictures. text_body: where it reads texts alone.
    bodies: bytes of all requests that are being received. read_time: for a whole body to arrive.
    messages: of a conversation. prompts: of a completion. samples: answers to one request.
    stops: stop strings; stop_length: characters of all of them. aux: auxiliary vectors.
    answer_time: from a request's arrival to the end of its answer, time in the queue included.
    idle_time: of a connection without a whole request head. stall_time: how long a client may leave
    its answer unread. connections: open at once; beyond it the longest idle one is closed.
    stop_time: for answers in progress, after the server was asked to stop.
    """

    body: int = 16 * _MIB
    text_body: int = 2 * _MIB
    bodies: int = 128 * _MIB
    read_time: float = 30.0
    messages: int = 1024
    prompts: int = 16
    samples: int = 16
    stops: int = 16
    stop_length: int = 1024
    aux: int = 1024
    answer_time: float = 300.0
    idle_time: float = 20.0
    stall_time: float = 30.0
    connections: int = 4096
    stop_time: float = 30.0
