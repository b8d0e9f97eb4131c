"""Requests in work, and their samples: tokens so far, the text that may be sent, and the end."""

import codecs
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from slam_jax.errors import first_line
from slam_jax.generation.answering import Answer, Sample, sample_of, special_stops
from slam_jax.generation.sampling import Sampling
from slam_jax.generation.stopping import cut, settled
from slam_jax.serving.constraints import Constraint
from slam_jax.serving.slots import Chosen
from slam_jax.serving.tickets import Event, Ticket


@dataclasses.dataclass(eq=False)
class Job:
    """An accepted request. limit: the most new tokens of a sample. ends_at: by `time.monotonic`,
    None = no deadline. memory: of its inputs, which memory_key identifies.

    While its prompt is read: the keys of the prompt's chunks, and the cache of one row with the
    first `read` tokens. number: the next sample to start. lives, ended: samples by their number.
    """

    loaded: Any
    ticket: Ticket
    prompt: list[int]
    seed: int
    limit: int
    sampling: Sampling
    constraint: Constraint | None
    num_top: int
    on_event: Callable[[Event], None] | None
    ends_at: float | None
    memory: Any
    memory_key: bytes
    keys: list[bytes] = dataclasses.field(default_factory=list)
    cache: Any = None
    read: int = 0
    number: int = 0
    ended: dict[int, Sample] = dataclasses.field(default_factory=dict)
    lives: dict[int, "Live"] = dataclasses.field(default_factory=dict)
    error: str | None = None

    @property
    def over(self) -> str | None:
        """Why the request must end now; None = it need not."""
        if self.ticket.cancelled:
            return "cancelled"
        late = self.ends_at is not None and time.monotonic() >= self.ends_at
        return "timeout" if late else None

    @property
    def is_read(self) -> bool:
        """Whether the cache has all of the prompt but its last token, which the step reads."""
        return self.cache is not None and self.read == len(self.prompt) - 1

    @property
    def starts(self) -> bool:
        """Whether there are samples that have not started."""
        return self.number < self.sampling.num_samples

    @property
    def done(self) -> bool:
        return len(self.ended) == self.sampling.num_samples

    def send(self, event: Event) -> None:
        if self.on_event is None:
            self.ticket.send(event)
        else:
            self.on_event(event)

    def end_sample(self, number: int, sample: Sample) -> None:
        self.lives.pop(number, None)
        self.ended[number] = sample
        if self.done:
            self.close()

    def stop(self, finish: str, error: str | None = None) -> None:
        """Ends all samples that have not ended. A callback that fails here is not called again."""
        self.error = self.error or error
        for number in range(self.sampling.num_samples):
            if number in self.ended:
                continue
            live = self.lives.pop(number, None) or Live(self, number, None)
            try:
                event, self.ended[number] = live.cut(finish, error)
            except BaseException:  # what failed is the tokenizer
                self.ended[number] = Sample("", (), (), finish)
                event = Event(number, "", finish=finish, error=error)
            try:
                self.send(event)
            except BaseException as failure:
                self.error = self.error or f"on_event: {first_line(failure)}"
        self.close()

    def close(self) -> None:
        """Gives the answer to those who wait, and lets go of arrays."""
        if not self.ticket.done:
            samples = [self.ended[number] for number in sorted(self.ended)]
            self.ticket.end(Answer(tuple(samples)), self.error)
        self.cache = self.memory = None


class Live:
    """A sample in a slot: its tokens, and how much of its text has been sent."""

    def __init__(self, job: Job, number: int, constraint: Constraint | None):
        self.job, self.number, self.constraint = job, number, constraint
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._sent = 0
        tokenizer = job.loaded.tokenizer
        self._ends = {*tokenizer.end_ids, *special_stops(tokenizer, job.sampling)}

    def take(self, chosen: Chosen, slot: int) -> tuple[Event, Sample | None]:
        """The event of one more token, and the sample if it has ended."""
        token, job = int(chosen.token[slot]), self.job
        self.tokens.append(token)
        self.logprobs.append(float(chosen.logprob[slot]))
        closed = False
        if self.constraint is not None:
            self.constraint.advance(token)
            closed = self.constraint.finished
        text, stopped = cut(job.loaded.tokenizer.to_bytes(self.tokens), job.sampling.stop)
        done = stopped or closed or token in self._ends or len(self.tokens) >= job.limit
        sample = None
        if done:
            sample = sample_of(job.loaded, job.sampling, self.tokens, self.logprobs)
            if closed and sample.finish == "length":
                sample = sample._replace(finish="end")
        piece = self._piece(text, done)
        new = (token,), (self.logprobs[-1],), self._top(chosen, slot)
        finish = None if sample is None else sample.finish
        return Event(self.number, piece, *new, finish), sample

    def cut(self, finish: str, error: str | None) -> tuple[Event, Sample]:
        """The last event, and the sample as it is, where it ends before its time."""
        text, _ = cut(self.job.loaded.tokenizer.to_bytes(self.tokens), self.job.sampling.stop)
        sample = sample_of(self.job.loaded, self.job.sampling, self.tokens, self.logprobs)
        event = Event(self.number, self._piece(text, True), finish=finish, error=error)
        return event, sample._replace(finish=finish)

    def _piece(self, text: bytes, done: bool) -> str:
        end = len(text) if done else settled(text, self.job.sampling.stop)
        piece = self._decoder.decode(text[self._sent : end], final=done)
        self._sent = max(self._sent, end)
        return piece

    def _top(self, chosen: Chosen, slot: int) -> tuple[tuple[tuple[int, float], ...], ...]:
        count = self.job.num_top
        if not count:
            return ()
        ids, logprobs = (
            np.asarray(x[slot, :count]).tolist() for x in (chosen.top_ids, chosen.top_logprobs)
        )
        return (tuple(zip(ids, logprobs, strict=True)),)
