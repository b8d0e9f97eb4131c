"""The engine: answers many requests at once, each as it would be answered alone."""

import math
import time
import weakref
from collections.abc import Callable
from typing import Any

from slam_jax.errors import ConfigError, InputError, is_whole, require_count, shorten
from slam_jax.generation.decode import LEAST_LENGTH
from slam_jax.generation.requests import (
    Request,
    Trained,
    allowed_tokens,
    read_inputs,
    read_prompts,
)
from slam_jax.generation.sampling import Sampling
from slam_jax.serving.constraints import Constraint
from slam_jax.serving.memories import Memories
from slam_jax.serving.prompt_cache import PromptCache
from slam_jax.serving.samples import Job
from slam_jax.serving.scheduler import Scheduler
from slam_jax.serving.slots import MOST_TOP, Slots
from slam_jax.serving.tickets import Event, Stats, Ticket

_USUAL_CONTEXT = 2048
_LAST_SECONDS = 10.0  # that a process which ends waits for a callback that does not return
_MOST_SLOTS, _MOST_CHUNK = 1024, 1 << 14


class Engine:
    """Answers many requests at once; each has its own rules, and the answer that it has alone.

    Requests join and leave between two steps of decoding. The tokens and log-probabilities of an
    answer are bitwise those of the same engine serving the request alone. It is a context manager.

    slots: answers that are computed at once. context: tokens that a slot has room for, prompt and
      answer; None = those of the model, at most 2,048. max_waiting: requests that may wait.
    chunk: tokens of a prompt that are read at a time, a power of two from 16 on.
    prompt_cache_mb: for prompts that begin like earlier ones; 0 = every prompt is read in full.

    Raises ConfigError, naming the argument, if a value cannot be used.
    """

    def __init__(
        self,
        loaded: Trained,
        *,
        slots: int = 4,
        context: int | None = None,
        max_waiting: int = 64,
        chunk: int = 64,
        prompt_cache_mb: int = 256,
    ):
        require_count("slots", slots, most=_MOST_SLOTS)
        require_count("max_waiting", max_waiting)
        require_count("prompt_cache_mb", prompt_cache_mb, least=0)
        require_count("chunk", chunk, LEAST_LENGTH, _MOST_CHUNK)
        if chunk & (chunk - 1):
            raise ConfigError(f"chunk is {chunk}; expected a power of two")
        model: Any = loaded.model
        most = model.config.context_length
        self._loaded = loaded
        self._context = min(most, _USUAL_CONTEXT) if context is None else context
        require_count("context", self._context, 2, most)
        self._memories = Memories(model)
        sizes = slots, self._context
        device = Slots(model, *sizes, allowed_tokens(loaded), self._memories.shape)
        prompts = PromptCache(device.axes, chunk, prompt_cache_mb << 20)
        self._scheduler = Scheduler(device, prompts, self._memories, chunk, max_waiting)
        # The thread does not refer to this object, so that it ends with it, or with the process.
        self._finalizer = weakref.finalize(self, self._scheduler.close, False, _LAST_SECONDS)

    @property
    def context(self) -> int:
        """The tokens that a slot has room for, prompt and answer."""
        return self._context

    @property
    def vocabulary(self) -> int:
        """The rows of the model's vocabulary, which a constraint's mask has."""
        return self._scheduler.vocabulary

    def submit(
        self,
        request: Request,
        sampling: Sampling | None = None,
        *,
        constraint: Constraint | None = None,
        num_top: int = 0,
        on_event: Callable[[Event], None] | None = None,
        deadline: float | None = None,
    ) -> Ticket:
        """Accepts a request; reads and encodes its parts in the caller's thread.

        constraint: says which tokens may come next; see `slam_jax.serving.constraints`.
        num_top: give the log-probabilities of so many tokens at each step, at most 20.
        on_event: called with each event by the engine's thread; it must be quick.
        deadline: seconds from now after which the request ends with "timeout".

        Raises InputError for what is wrong with the request, as `generate` does, QueueFull
        where `max_waiting` requests wait, and EngineClosed.
        """
        self._scheduler.check()
        sampling = sampling or Sampling()
        if deadline is not None and math.isnan(deadline):
            raise InputError("deadline is nan; expected seconds")
        ends_at = None if deadline is None else time.monotonic() + deadline
        model: Any = self._loaded.model
        most = min(MOST_TOP, model.config.vocab_size)
        if not is_whole(num_top) or not 0 <= num_top <= most:
            raise InputError(f"num_top is {shorten(repr(num_top))}; expected 0 to {most}")
        for text in sampling.stop:
            self._loaded.tokenizer.check(text, "stop")
        prompts = read_prompts(self._loaded, [request], sampling.max_new_tokens, self._context)
        prompt = prompts.tokens[0, : prompts.lengths[0]].tolist()
        if not prompt:
            raise InputError("the prompt has no tokens; give a text")
        inputs = read_inputs(self._loaded, [request])
        key, ticket = self._memories.check(inputs), Ticket(len(prompt))
        # A new shape is compiled here, so that answers in progress do not wait for it.
        memory = self._memories.encode(inputs, key)
        rules = (sampling, constraint, num_top, on_event, ends_at)
        seed, limit = int(prompts.seeds[0]), int(prompts.limits[0])
        self._scheduler.add(Job(self._loaded, ticket, prompt, seed, limit, *rules, memory, key))
        return ticket

    def stats(self) -> Stats:
        """What the engine does now, and has done."""
        return self._scheduler.stats()

    def close(self, *, drain: bool = True) -> None:
        """Accepts no more requests, and returns when the accepted ones have ended.

        drain: they are answered; else they are cancelled.
        """
        self._scheduler.close(drain)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(drain=kind is None)
