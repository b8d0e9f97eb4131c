"""From requests to texts: at once, in pieces, or as scores of given answers."""

import codecs
import dataclasses
import functools
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slam_jax.errors import InputError
from slam_jax.generation.decode import (
    LEAST_LENGTH,
    Decoding,
    Ends,
    bucket,
    continue_decoding,
    end_ids_of,
    only_allowed,
    start_decoding,
)
from slam_jax.generation.requests import (
    Request,
    Trained,
    allowed_tokens,
    append_answers,
    checked,
    read_inputs,
    read_prompts,
)
from slam_jax.generation.sampling import Sampling
from slam_jax.generation.stopping import cut, settled, stop_table

_TOKENS_AT_A_TIME = 4


class Sample(NamedTuple):
    """One answer.

    text: up to its end, without the stop string. tokens: all that were generated, <eos> included.
    logprobs: of each token given those before, in nats, under the model itself (before
    temperature, filters and penalty). finish: "end" (by <eos>), "stop" (by a stop string) or
    "length" (cut: the limit of new tokens, or the context, was reached).
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str

    @property
    def logprob(self) -> float:
        """The log-probability of the whole answer."""
        return sum(self.logprobs)


class Answer(NamedTuple):
    """The `num_samples` answers to a request."""

    samples: tuple[Sample, ...]

    @property
    def text(self) -> str:
        """The text of the first sample."""
        return self.samples[0].text


class Score(NamedTuple):
    """A given answer, its log-probability in nats, and its number of tokens; the <eos> counts."""

    text: str
    logprob: float
    num_tokens: int


def encode(loaded: Trained, request: Request) -> Any:
    """The encoder's memory of one request's inputs, for any number of prompts.

    Give it to `generate`, `stream` or `score` as `memory`, with requests of prompts alone.
    """
    inputs = read_inputs(loaded, [request])
    if inputs is None:
        raise InputError("this model reads prompts alone; there is nothing to encode")
    return _encode(loaded.model, inputs)


def generate(
    loaded: Trained,
    requests: Sequence[Request],
    sampling: Sampling | None = None,
    *,
    memory: Any = None,
) -> list[Answer]:
    """Answers every request; requests may differ in their inputs and in all lengths.

    All stopping rules run on the device. Sizes are rounded up to powers of two (requests, auxiliary
    vectors, and from 16 on tokens of prompts, texts and answers), so that few shapes are compiled.

    memory: of `encode`; all requests are then about it.

    Raises InputError, which says in one line what is wrong with which request.
    """
    sampling = sampling or Sampling()
    state, memory = _start(loaded, requests, sampling, memory)
    state = continue_decoding(loaded.model, memory, state, state.tokens.shape[-1])
    count, rows = sampling.num_samples, _rows(state)
    return [
        Answer(tuple(sample_of(loaded, sampling, *next(rows)) for _ in range(count)))
        for _ in requests
    ]


class AnswerStream(Iterator[str]):
    """The pieces of one answer, in order. finish: as in `Sample`, None until all are read."""

    finish: str | None = None

    def __init__(self, pieces: Generator[str, None, str]):
        # The generator does not refer to this object: a cycle would keep the cache of an answer
        # that nobody reads to its end.
        self._pieces = pieces

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.finish = self.finish or end.value
            raise


def _pieces(
    loaded: Trained, request: Request, sampling: Sampling, memory: Any
) -> Generator[str, None, str]:
    """The pieces of one answer; returns why it ended."""
    state, memory = _start(loaded, [request], sampling, memory)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sent, until, done = 0, 1, False
    while not done:
        tokens, logprobs = next(_rows(state))
        text, _ = cut(loaded.tokenizer.to_bytes(tokens), sampling.stop)
        done = bool(np.asarray(state.done).flat[0])
        end = len(text) if done else settled(text, sampling.stop)
        if piece := decoder.decode(text[sent:end], final=done):
            yield piece
        if not done:
            sent, until = end, until + _TOKENS_AT_A_TIME
            state = continue_decoding(loaded.model, memory, state, until)
    return sample_of(loaded, sampling, tokens, logprobs).finish


def stream(
    loaded: Trained, request: Request, sampling: Sampling | None = None, *, memory: Any = None
) -> AnswerStream:
    """The text of `generate`'s first sample in pieces, as it comes.

    A piece ends between two characters, and before text that may turn out to be a stop string.
    """
    sampling = dataclasses.replace(sampling or Sampling(), num_samples=1)
    return AnswerStream(_pieces(loaded, request, sampling, memory))


def score(
    loaded: Trained, request: Request, answers: Sequence[str], *, memory: Any = None
) -> list[Score]:
    """The log-probability of each given answer as the whole answer to the request.

    Of several choices, the model's is the one with the highest `logprob`.

    Raises InputError as `generate` does, and where there is no answer.
    """
    if isinstance(answers, str) or not answers:
        raise InputError("answers: give a list of at least one text")
    tokenizer = loaded.tokenizer
    texts = [checked(tokenizer, answer, "answer") for answer in answers]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    rows = [[*tokenizer.encode(text), *end] for text in texts]
    prompts = read_prompts(loaded, [request], max(map(len, rows)))
    tokens, scored = append_answers(prompts, rows, tokenizer.pad_id)
    memory = _remember(loaded, [request], memory)
    given = (loaded.model, memory, tokens[None], scored[None])
    logprobs = np.asarray(_score(*given, allowed_tokens(loaded)))[0].tolist()
    return [Score(*each) for each in zip(answers, logprobs, map(len, rows), strict=False)]


def _start(
    loaded: Any, requests: Sequence[Request], sampling: Sampling, memory: Any
) -> tuple[Decoding, Any]:
    """The state after the first token of every answer, and the memory.

    The rows of the state are [B, samples], or [1, B x samples] where all share the memory given.
    """
    prompts = read_prompts(loaded, requests, sampling.max_new_tokens)
    count = sampling.num_samples
    shape = (len(prompts.seeds), count) if memory is None else (1, len(prompts.seeds) * count)

    def spread(x: np.ndarray) -> np.ndarray:
        return np.repeat(x, count, axis=0).reshape(*shape, *x.shape[1:])

    memory = _remember(loaded, requests, memory)
    keys = _keys(prompts.seeds, count).reshape(shape)
    ends = _ends(loaded, sampling)
    # The cache needs no more room than the context has.
    context = loaded.model.config.context_length
    room = min(bucket(int(prompts.limits.max()), LEAST_LENGTH), context)
    tokens, lengths, limits = map(spread, (prompts.tokens, prompts.lengths, prompts.limits))
    args = (loaded.model, memory, tokens, lengths, keys, sampling.rules, ends, limits)
    return start_decoding(*args, max_new_tokens=room), memory


def _remember(loaded: Any, requests: Sequence[Request], memory: Any) -> Any:
    """The given memory, or that of the requests' inputs; None for a model of prompts alone."""
    if memory is None:
        inputs = read_inputs(loaded, requests)
        return None if inputs is None else _encode(loaded.model, inputs)
    if any(value is not None for r in requests for value in (r.text, r.image, r.aux)):
        raise InputError("a request has inputs beside `memory`; give it the prompt alone")
    return memory


@jax.jit
def _encode(model, inputs):
    return model.encode(inputs)


@functools.partial(jax.jit, static_argnames="count")
def _keys(seeds, count):
    """[B, count] keys, one a sample."""
    sample = jnp.arange(count, dtype=jnp.uint32)
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(lambda seed: fold_in(jax.random.key(seed), sample))(seeds)


@jax.jit
def _score(model, memory, tokens, scored, allowed):
    cache = model.init_cache(tokens.shape[:2], tokens.shape[2] - 1)
    logits, _ = model.prefill(tokens[..., :-1], cache, memory)
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(only_allowed(logits, allowed)), tokens[..., 1:, None], axis=-1
    )
    return jnp.where(scored, chosen[..., 0], 0.0).sum(axis=-1)


def _rows(state: Decoding) -> Iterator[tuple[list[int], list[float]]]:
    """The new tokens of each row, and their log-probabilities."""
    tokens, logprobs, lengths = map(np.asarray, (state.tokens, state.logprobs, state.length))
    for row in np.ndindex(lengths.shape):
        yield tokens[row][: lengths[row]].tolist(), logprobs[row][: lengths[row]].tolist()


def sample_of(
    loaded: Any, sampling: Sampling, tokens: Sequence[int], logprobs: Sequence[float]
) -> Sample:
    """The answer of these tokens, which end where the rules say."""
    text, stopped = cut(loaded.tokenizer.to_bytes(tokens), sampling.stop)
    ended = bool(tokens) and tokens[-1] in loaded.tokenizer.end_ids
    # A stop string that is a special token has no bytes.
    stopped |= bool(tokens) and tokens[-1] in special_stops(loaded.tokenizer, sampling)
    finish = "stop" if stopped else "end" if ended else "length"
    return Sample(text.decode("utf-8", "replace"), tuple(tokens), tuple(logprobs), finish)


def special_stops(tokenizer: Any, sampling: Sampling) -> list[int]:
    """The stop strings that are special tokens, as ids."""
    found = map(tokenizer.special_id, sampling.stop)
    return [token for token in found if token is not None]


def _ends(loaded: Any, sampling: Sampling) -> Ends:
    """What ends an answer of this model."""
    tokenizer = loaded.tokenizer
    for text in sampling.stop:
        tokenizer.check(text, "stop")
    stops = stop_table(sampling.stop, tokenizer) if sampling.stop else None
    ids = end_ids_of([*tokenizer.end_ids, *special_stops(tokenizer, sampling)])
    return Ends(ids, tokenizer.pad_id, stops, allowed_tokens(loaded))
