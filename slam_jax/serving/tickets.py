"""What the engine gives to those who submit requests: tickets, events and counts."""

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from slam_jax.errors import UserError
from slam_jax.generation.answering import Answer


class QueueFull(UserError):
    """As many requests wait as the engine lets wait; submit this one again later."""


class EngineClosed(UserError):
    """The engine accepts no more requests: it was closed, or the device failed too often."""


class RequestFailed(UserError):
    """An accepted request could not be answered to its end."""


class Event(NamedTuple):
    """One piece of one sample; the pieces of a sample come in order.

    sample: its number, from 0. text: ends between characters, and before what may become a stop
    string; it may be "". tokens, logprobs: new ones, as in `Sample`. top: for each token the
    `num_top` most probable ones, each with its log-probability; () where none were asked for.
    finish: None, or why the sample ended, with its last piece: as in `Sample`, or "cancelled",
    "timeout" or "error". error: what failed, in one line.
    """

    sample: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    finish: str | None = None
    error: str | None = None


class Stats(NamedTuple):
    """The state of an engine, and counts since its start.

    active: slots in use. waiting: requests that have not begun. requests: those that ended, by
    "done", "cancelled", "timeout" and "error". prompt_tokens, reused_prompt_tokens: all that were
    needed, and those that came from the prompt cache. new_tokens: of answers. encodes,
    reused_encodes: memories that were computed, and that were kept from before. broken: the device
    failed again and again, and nothing is answered any more.
    """

    slots: int
    active: int
    waiting: int
    requests: Mapping[str, int]
    prompt_tokens: int
    reused_prompt_tokens: int
    new_tokens: int
    encodes: int
    reused_encodes: int
    broken: bool


class Ticket(Iterator[Event]):
    """An accepted request: an iterator of its events, of all samples as they come.

    With `on_event` the events go there, and the iterator only waits for the end.
    prompt_tokens: the number of tokens of the prompt. reused_prompt_tokens: those of them that came
    from the prompt cache, so far. cancelled: whether `cancel` was called.
    """

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens = prompt_tokens
        self.reused_prompt_tokens = 0
        self.cancelled = False
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._answer: Answer | None = None
        self._error: str | None = None

    def __next__(self) -> Event:
        event = self._events.get()
        if event is None:
            self._events.put(None)  # for whoever asks again
            raise StopIteration
        return event

    def cancel(self) -> None:
        """Ends the request; its slots are free before the next step. Without effect at its end."""
        self.cancelled = True

    @property
    def done(self) -> bool:
        """Whether all samples have ended."""
        return self._ended.is_set()

    def result(self, timeout: float | None = None) -> Answer:
        """Waits for all samples; a cancelled one has the text so far.

        timeout: seconds, None = any number. Not to be called in `on_event`.

        Raises RequestFailed where a sample ended with "error", and TimeoutError.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"no answer after {timeout:g} seconds")
        if self._error is not None or self._answer is None:
            raise RequestFailed(self._error or "the engine stopped")
        return self._answer

    def send(self, event: Event) -> None:
        """Adds an event; called by the engine."""
        self._events.put(event)

    def end(self, answer: Answer, error: str | None) -> None:
        """All samples have ended; called by the engine."""
        self._answer, self._error = answer, error
        self._ended.set()
        self._events.put(None)
