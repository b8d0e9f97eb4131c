"""The loop of the engine: one thread that reads prompts and steps all slots."""

import threading
from collections import Counter, deque
from typing import Any

import numpy as np

from slam_jax.errors import InputError, first_line, shorten
from slam_jax.generation.decode import LEAST_LENGTH, bucket
from slam_jax.serving.memories import Memories
from slam_jax.serving.prompt_cache import PromptCache
from slam_jax.serving.samples import Job, Live
from slam_jax.serving.slots import Slots, Start
from slam_jax.serving.tickets import EngineClosed, QueueFull, Stats

_MOST_FAILURES = 3
"""Failures of the device in a row after which the engine gives up."""


class Scheduler:
    """Serves jobs in the order in which they came, on a thread of its own.

    Between two steps of the slots it reads at most about `chunk` tokens of prompts, one chunk of
    each prompt in turn, so that nobody waits for a long prompt. What a callback, a constraint or a
    tokenizer raises ends its job alone, be it SystemExit or a panic of Rust.
    """

    def __init__(
        self, slots: Slots, prompts: PromptCache, memories: Memories, chunk: int, max_waiting: int
    ):
        self._slots, self._prompts, self._memories = slots, prompts, memories
        self._chunk, self._max_waiting = chunk, max_waiting
        # Guards what other threads change: the waiting jobs and whether the engine closes.
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._closing = self._abandons = False
        self._broken: str | None = None
        self._reading: deque[Job] = deque()
        self._starting: deque[Job] = deque()  # read, with samples that wait for a slot
        self._lives: list[Live | None] = [None] * slots.count
        self._ended: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="slam_jax engine", daemon=True)
        self._thread.start()

    @property
    def vocabulary(self) -> int:
        return self._slots.vocabulary

    def check(self) -> None:
        """Raises QueueFull where no further job may wait, EngineClosed where none is accepted."""
        with self._lock:
            if self._broken is not None:
                raise EngineClosed(f"the engine broke ({self._broken}); start another one")
            if self._closing:
                raise EngineClosed("the engine is closed; start another one")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull(
                    f"{len(self._waiting):,} requests wait, which is max_waiting; try again later"
                )

    def add(self, job: Job) -> None:
        """Accepts a job. Raises as `check` does."""
        with self._lock:
            self.check()
            self._waiting.append(job)
            self._lock.notify()

    def stats(self) -> Stats:
        counts = self._counts
        return Stats(
            slots=self._slots.count,
            active=sum(live is not None for live in self._lives),
            waiting=len(self._waiting),
            requests=dict(self._ended),
            prompt_tokens=counts["prompt"],
            reused_prompt_tokens=counts["reused"],
            new_tokens=counts["new"],
            encodes=self._memories.encodes,
            reused_encodes=self._memories.reused,
            broken=self._broken is not None,
        )

    def close(self, drain: bool, timeout: float | None = None) -> None:
        """Accepts no more jobs, ends or cancels the accepted ones, and waits for that.

        timeout: of waiting, in seconds; None = none.
        """
        with self._lock:
            self._closing, self._abandons = True, self._abandons or not drain
            self._lock.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        error = "the engine was closed"
        try:
            while self._wait():
                self._round()
        except BaseException as failure:
            error = self._broken = first_line(failure)
        finally:
            with self._lock:
                self._closing = True
            for job in self._jobs():
                self._stop(job, "error", error)
            self._forget_ended()

    def _wait(self) -> bool:
        """Waits for work; False where none will come."""
        with self._lock:
            while not self._jobs():
                if self._closing:
                    return False
                self._lock.wait()
        return True

    def _round(self) -> None:
        """What comes between two steps, and a step."""
        for job in self._jobs():
            over = "cancelled" if self._abandons else job.over
            if over is not None:
                self._stop(job, over)
        self._forget_ended()
        self._start_samples()
        self._admit()
        budget = self._chunk
        while budget > 0 and self._reading:
            budget -= self._read_some()
            self._start_samples()
        self._step()
        self._forget_ended()

    def _jobs(self) -> list[Job]:
        """All jobs, each once."""
        lives = [live.job for live in self._lives if live is not None]
        with self._lock:
            return list(dict.fromkeys((*lives, *self._starting, *self._reading, *self._waiting)))

    def _stop(self, job: Job, finish: str, error: str | None = None) -> None:
        """Ends a job before its time."""
        if not job.done:
            self._ended[finish] += 1
            job.stop(finish, error)

    def _forget_ended(self) -> None:
        """Frees the slots of samples, and the places of jobs, that have ended."""
        for slot, live in enumerate(self._lives):
            if live is not None and live.number in live.job.ended:
                self._lives[slot] = None
        for jobs in (self._starting, self._reading):
            for job in [job for job in jobs if job.done]:
                jobs.remove(job)
        with self._lock:
            for job in [job for job in self._waiting if job.done]:
                self._waiting.remove(job)

    def _admit(self) -> None:
        """Takes as many waiting jobs as there are slots that nobody else will take."""
        with self._lock:
            taken = sum(live is not None for live in self._lives) + len(self._reading)
            while self._waiting and not self._starting and taken < self._slots.count:
                self._reading.append(self._waiting.popleft())
                taken += 1

    def _read_some(self) -> int:
        """Reads one piece of the prompt whose turn it is; returns how many tokens were computed."""
        job = self._reading.popleft()
        try:
            cost = self._read_piece(job)
        except Exception as failure:
            self._stop(job, "error", first_line(failure))
            return self._chunk
        (self._starting if job.is_read else self._reading).append(job)
        return cost

    def _read_piece(self, job: Job) -> int:
        if job.cache is None:
            job.keys = self._prompts.keys(job.prompt[:-1], job.memory_key)
            job.cache = self._slots.empty_row()
            self._counts["prompt"] += len(job.prompt)
        while (index := job.read // self._chunk) < len(job.keys):
            cache = self._prompts.restore(job.cache, job.keys[index], index)
            if cache is None:
                break
            job.cache, job.read = cache, job.read + self._chunk
            self._counts["reused"] += self._chunk
            job.ticket.reused_prompt_tokens += self._chunk
        cost = 0
        if tokens := job.prompt[job.read : min(job.read + self._chunk, len(job.prompt) - 1)]:
            job.cache = self._slots.read(job.cache, job.memory, tokens)
            job.read += len(tokens)
            cost = bucket(len(tokens), LEAST_LENGTH)
            if len(tokens) == self._chunk:
                self._prompts.store(job.cache, job.keys[index], index)
        if job.is_read:
            self._prompts.touch(job.keys)
        return cost

    def _start_samples(self) -> None:
        """Fills free slots with samples whose prompts are read."""
        for slot, live in enumerate(self._lives):
            if live is None and self._starting:
                self._start(self._starting[0], slot)
                self._forget_ended()

    def _start(self, job: Job, slot: int) -> None:
        number = job.number
        try:
            copied = None if job.constraint is None else job.constraint.copy()
        except BaseException as failure:
            self._stop(job, "error", f"constraint: {first_line(failure)}")
            return
        seen = np.zeros(self._slots.vocabulary, bool)
        seen[job.prompt] = True
        given = (job.prompt[-1], job.seed, number, seen, job.sampling, bool(job.num_top))
        try:
            self._slots.place(slot, Start(job.cache, job.memory, *given))
        except Exception as failure:
            self._stop(job, "error", first_line(failure))
            self._recover(failure)
            return
        self._lives[slot] = job.lives[number] = Live(job, number, copied)
        job.number += 1
        if not job.starts:
            self._starting.popleft()
            job.cache = job.memory = None

    def _step(self) -> None:
        """One more token of each sample in a slot."""
        mask = self._masks()
        active = np.array([live is not None for live in self._lives])
        if not active.any():
            return
        try:
            chosen = self._slots.step(mask, active)
        except Exception as failure:
            self._recover(failure)
            return
        self._failures = 0
        for slot, live in enumerate(self._lives):
            if live is None or live.number in live.job.ended:
                continue  # another sample of its job has failed
            job = live.job
            self._counts["new"] += 1
            try:
                event, sample = live.take(chosen, slot)
                job.send(event)
            except BaseException as failure:
                self._stop(job, "error", first_line(failure))
                continue
            if sample is not None:
                job.end_sample(live.number, sample)
                self._ended["done"] += job.done

    def _masks(self) -> Any:
        """The tokens that each slot may have next, [S, V]."""
        mask = None
        for slot, live in enumerate(self._lives):
            if live is None or live.constraint is None:
                continue
            if mask is None:
                mask = np.ones(self._slots.any_token.shape, bool)
            try:
                mask[slot] = live.constraint.allowed()
                if not mask[slot].any():
                    raise InputError("it allows no token")
            except BaseException as failure:
                mask[slot] = True
                self._stop(live.job, "error", f"constraint: {first_line(failure)}")
        self._forget_ended()
        return self._slots.any_token if mask is None else mask

    def _recover(self, failure: Exception) -> None:
        """Ends what is in slots after a failure of the device, and empties them."""
        error = shorten(first_line(failure))
        for live in self._lives:
            if live is not None:
                self._stop(live.job, "error", error)
        self._forget_ended()
        self._failures += 1
        if self._failures > _MOST_FAILURES:
            raise failure
        self._slots.reset()
