"""Requests in, texts out: at once, as they come, or as scores of given answers."""

import codecs
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slam_jax.errors import InputError
from slam_jax.generation.decode import Decoded, continue_decoding, decode, start_decoding
from slam_jax.generation.requests import (
    Prompts,
    Request,
    Trained,
    bucket,
    checked,
    read_inputs,
    read_prompts,
)
from slam_jax.generation.sampling import Sampling
from slam_jax.generation.stopping import cut, settled, stop_table

_LEAST_NEW_TOKENS = 16
_TOKENS_AT_A_TIME = 4


class Sample(NamedTuple):
    """One answer.

    text: up to its end, without the stop string. tokens: all that were generated, <eos> included.
    logprobs: of each of them given those before, in nats, under the model itself (before
    temperature, filters and penalty). finish: "end" (by itself), "stop" (a stop string), "length".
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str

    @property
    def logprob(self) -> float:
        """Of the whole answer."""
        return sum(self.logprobs)


class Answer(NamedTuple):
    """What a request got: `num_samples` answers."""

    samples: tuple[Sample, ...]

    @property
    def text(self) -> str:
        """Of the first one."""
        return self.samples[0].text


class Score(NamedTuple):
    """A given answer and its log-probability, in nats, with the <eos> after it; tokens likewise."""

    text: str
    logprob: float
    num_tokens: int


def encode(loaded: Trained, request: Request) -> Any:
    """What a model keeps of one request's inputs, for any number of prompts.

    Give it to `generate`, `stream` or `score` as `memory`, with requests of prompts alone.
    """
    return _encode(loaded.model, _required(read_inputs(loaded, [request])))


def generate(
    loaded: Trained,
    requests: Sequence[Request],
    sampling: Sampling | None = None,
    *,
    memory: Any = None,
) -> list[Answer]:
    """Answers every request; they may differ in what they give and in all lengths.

    One compiled call reads, decodes and stops on the device. Its shapes are rounded up to powers of
    two (requests, prompt and text tokens from 16 on, auxiliary vectors, new tokens from 16 on): so
    many programs there are at most for each mix of inputs, whatever the requests.

    Args:
      memory: of `encode`; then all requests are about that.

    Raises:
      InputError: in one line which request has what wrong.
    """
    sampling = sampling or Sampling()
    prompts, inputs = _read(loaded, requests, memory, sampling.max_new_tokens)
    new = _generate(
        loaded.model,
        inputs,
        memory,
        prompts,
        sampling.rules,
        _stops(loaded, sampling),
        jnp.int32(sampling.max_new_tokens),
        **_settings(loaded, sampling),
    )
    tokens, logprobs = (np.asarray(part)[: len(requests)].tolist() for part in new)
    return [
        Answer(tuple(_sample(loaded, sampling, *row) for row in zip(*samples, strict=True)))
        for samples in zip(tokens, logprobs, strict=True)
    ]


def stream(
    loaded: Trained,
    request: Request,
    sampling: Sampling | None = None,
    *,
    memory: Any = None,
) -> Iterator[str]:
    """The text of `generate`'s first sample in pieces, as it comes.

    A piece ends between two letters, and before what may yet turn out to be a stop string.
    """
    sampling = sampling or Sampling()
    prompts, inputs = _read(loaded, [request], memory, sampling.max_new_tokens)
    rules, stops = sampling.rules, _stops(loaded, sampling)
    settings = {**_settings(loaded, sampling), "num_samples": 1}
    state, memory = _start(loaded.model, inputs, memory, prompts, rules, stops, **settings)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    known, told, until = b"", 0, 1
    while True:
        tokens = np.asarray(state.tokens).reshape(-1, state.tokens.shape[-1])[0, :until].tolist()
        known, found = cut(_bytes(loaded, tokens), sampling.stop)
        finished = found or until == sampling.max_new_tokens or loaded.tokenizer.eos_id in tokens
        end = len(known) if finished else settled(known, sampling.stop)
        if piece := decoder.decode(known[told:end], final=finished):
            yield piece
        if finished:
            return
        told, until = end, min(until + _TOKENS_AT_A_TIME, sampling.max_new_tokens)
        state = _continue(
            loaded.model, memory, state, rules, stops, jnp.int32(until), **_ids(loaded)
        )


def score(
    loaded: Trained, request: Request, answers: Sequence[str], *, memory: Any = None
) -> list[Score]:
    """How probable each of the given answers is, as the whole answer to the request.

    Of several choices the model's is the one with the highest `logprob`.

    Raises InputError as `generate` does, and where there is no answer.
    """
    if isinstance(answers, str) or not answers:
        raise InputError("answers: give a list of at least one text")
    tokenizer = loaded.tokenizer
    texts = [checked(answer, "answer") for answer in answers]
    rows = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    prompts, inputs = _read(loaded, [request], memory, max(map(len, rows)))
    start = prompts.tokens[0, : prompts.lengths[0]].tolist()
    longest = bucket(len(start) + max(map(len, rows)), _LEAST_NEW_TOKENS)
    tokens = np.full((1, bucket(len(rows)), longest), tokenizer.pad_id, np.int32)
    scored = np.zeros((*tokens.shape[:-1], longest - 1), bool)
    for i, row in enumerate(rows):
        tokens[0, i, : len(start) + len(row)] = start + row
        scored[0, i, len(start) - 1 : len(start) + len(row) - 1] = True
    logprobs = np.asarray(_score(loaded.model, inputs, memory, tokens, scored))[0].tolist()
    pairs = zip(answers, logprobs, rows, strict=False)
    return [Score(answer, logprob, len(row)) for answer, logprob, row in pairs]


@jax.jit
def _encode(model, inputs):
    return model.encode(inputs)


def _remember(model, inputs, memory):
    """The memory given, or that of the inputs, or None where a model has none."""
    return memory if inputs is None else model.encode(inputs)


def _rows(prompts: Prompts, memory_is_shared: bool, num_samples: int):
    """[B, samples] rows of as many requests; where all share one memory, [1, B x samples]."""

    def spread(x):
        x = jnp.repeat(jnp.asarray(x)[:, None], num_samples, axis=1)
        return x.reshape(1, -1, *x.shape[2:]) if memory_is_shared else x

    tokens, lengths, _, valid = map(spread, prompts)
    sample = jnp.arange(num_samples, dtype=jnp.uint32)
    keys = jax.vmap(
        lambda seed: jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(sample)
    )(jnp.asarray(prompts.seeds))
    return tokens, lengths, keys.reshape(lengths.shape), valid


_STATIC = ("num_samples", "max_new_tokens", "eos_id", "pad_id")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _generate(model, inputs, memory, prompts, rules, stops, limit, *, num_samples, **settings):
    tokens, lengths, keys, valid = _rows(prompts, memory is not None, num_samples)
    memory = _remember(model, inputs, memory)
    new = decode(
        model, memory, tokens, lengths, keys, rules, stops, limit=limit, valid=valid, **settings
    )
    # Whatever the rows were arranged as, the caller sees requests and their samples.
    shape = (-1, num_samples, new.tokens.shape[-1])
    return Decoded(*(part.reshape(shape) for part in new))


@functools.partial(jax.jit, static_argnames=_STATIC)
def _start(model, inputs, memory, prompts, rules, stops, *, num_samples, **settings):
    tokens, lengths, keys, valid = _rows(prompts, memory is not None, num_samples)
    memory = _remember(model, inputs, memory)
    state = start_decoding(
        model, memory, tokens, lengths, keys, rules, stops, valid=valid, **settings
    )
    return state, memory


@functools.partial(jax.jit, static_argnames=("eos_id", "pad_id"), donate_argnames="state")
def _continue(model, memory, state, rules, stops, until, **ids):
    return continue_decoding(model, memory, state, rules, stops, until=until, **ids)


@jax.jit
def _score(model, inputs, memory, tokens, scored):
    memory = _remember(model, inputs, memory)
    count, length = tokens.shape[1], tokens.shape[2] - 1
    cache = model.init_cache((1, count), length)
    logits, _ = model.prefill(tokens[..., :-1], cache, memory)
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, tokens[..., 1:, None], axis=-1)[..., 0]
    return jnp.where(scored, chosen, 0.0).sum(axis=-1)


def _read(loaded: Any, requests: Sequence[Request], memory: Any, max_new_tokens: int) -> Any:
    prompts = read_prompts(loaded, requests, max_new_tokens)
    if memory is None:
        return prompts, read_inputs(loaded, requests)
    if any(value is not None for r in requests for value in (r.text, r.image, r.aux)):
        raise InputError("a request has inputs beside `memory`; give it the prompt alone")
    return prompts, None


def _required(inputs: Any) -> Any:
    if inputs is None:
        raise InputError("this model reads prompts alone; there is nothing to encode")
    return inputs


def _settings(loaded: Any, sampling: Sampling) -> dict[str, int]:
    context = loaded.model.config.context_length
    room = min(bucket(sampling.max_new_tokens, _LEAST_NEW_TOKENS), context)
    return {"num_samples": sampling.num_samples, "max_new_tokens": room, **_ids(loaded)}


def _ids(loaded: Any) -> dict[str, int]:
    return {"eos_id": loaded.tokenizer.eos_id, "pad_id": loaded.tokenizer.pad_id}


def _stops(loaded: Any, sampling: Sampling) -> Any:
    if not sampling.stop:
        return None
    return _stop_table(tuple(sampling.stop), loaded.tokenizer)


@functools.lru_cache(maxsize=64)
def _stop_table(stops: tuple[str, ...], tokenizer: Any) -> Any:
    return stop_table(stops, tokenizer.token_bytes)


def _sample(loaded: Any, sampling: Sampling, tokens: list[int], logprobs: list[float]) -> Sample:
    eos_id, count = loaded.tokenizer.eos_id, sampling.max_new_tokens
    ended = eos_id in tokens[:count]
    if ended:
        count = tokens.index(eos_id) + 1
    text, stopped = cut(_bytes(loaded, tokens[:count]), sampling.stop)
    if stopped and not ended:
        count = _stopped_after(loaded, sampling, tokens[:count])
    finish = "stop" if stopped else "end" if ended else "length"
    return Sample(
        text.decode("utf-8", "replace"), tuple(tokens[:count]), tuple(logprobs[:count]), finish
    )


def _stopped_after(loaded: Any, sampling: Sampling, tokens: list[int]) -> int:
    """How many tokens there were when the first stop string was whole."""
    for count in range(1, len(tokens)):
        if cut(_bytes(loaded, tokens[:count]), sampling.stop)[1]:
            return count
    return len(tokens)


def _bytes(loaded: Any, tokens: list[int]) -> bytes:
    """Of the tokens up to <eos>; specials have none."""
    pieces = loaded.tokenizer.token_bytes
    if loaded.tokenizer.eos_id in tokens:
        tokens = tokens[: tokens.index(loaded.tokenizer.eos_id)]
    return b"".join(pieces[token] for token in tokens)
