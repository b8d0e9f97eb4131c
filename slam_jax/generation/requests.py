"""Requests, and the arrays of a few fixed shapes that the model reads for them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, UInt32

from slam_jax.data.images import load_image
from slam_jax.data.numbers import AuxFormat, as_vectors
from slam_jax.data.tokenizer import Tokenizer, check_text
from slam_jax.errors import InputError, is_whole, shorten
from slam_jax.generation.decode import LEAST_LENGTH, bucket
from slam_jax.protocol import Decodable
from slam_jax.slam_v3.streams import Inputs

_USUAL_LENGTH = 32


@runtime_checkable
class Trained(Protocol):
    """A model with what it takes to ask it; `slam_jax.load` returns one.

    The model has a `config` with `vocab_size` and `context_length`, and with `image` and `aux_dim`
    (see `SlamV3Config`) where it reads more than prompts. An attribute `max_new_tokens` is the
    default length of answers; without one it is 32.
    """

    @property
    def model(self) -> Decodable: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def aux_format(self) -> AuxFormat | None: ...


@dataclasses.dataclass(frozen=True)
class ModelAndTokenizer:
    """A model that reads prompts alone, such as a language model, and its tokenizer.

    Raises InputError where the tokenizer has more or fewer tokens than the model.
    """

    model: Any
    tokenizer: Tokenizer
    aux_format: None = None
    max_new_tokens: int = _USUAL_LENGTH

    def __post_init__(self) -> None:
        check_vocabulary(self)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and what it is about: any mix of text, image and aux, at least one of them.

    prompt: what the answer continues.
    text: an empty one counts as None.
    image: a path, the bytes of a file, a PIL image, or an array of bytes [H, W, 3], of any size.
    aux: rows of numbers as the model was trained on; for a model of a table's columns, numbers by
      column name.
    seed: of sampling. The same request with the same seed has the same answer, alone or in a batch.
    """

    prompt: str = ""
    text: str | None = None
    image: Any = None
    aux: Any = None
    seed: int = 0


class Prompts(NamedTuple):
    """Right-padded prompts. limits: how many new tokens each may get, 0 for rows that only fill the
    shape."""

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B"]
    seeds: UInt32[np.ndarray, "B"]
    limits: Int32[np.ndarray, "B"]


def check_vocabulary(loaded: Any) -> None:
    """Raises InputError unless the tokenizer has as many tokens as the model."""
    ours, models = loaded.tokenizer.vocab_size, loaded.model.config.vocab_size
    if ours != models:
        raise InputError(
            f"the tokenizer has {ours:,} tokens and the model {models:,}; give the tokenizer that "
            "the model was trained with"
        )


def read_prompts(
    loaded: Trained, requests: Sequence[Request], max_new_tokens: int | None
) -> Prompts:
    """The prompts, each after a <bos>, with rows and columns rounded up to a bucket.

    max_new_tokens: None = the default of the model, or what is left of its context.

    Raises InputError where there is no request, where a prompt with its answer is longer than the
    context, or as `check_vocabulary` does.
    """
    if not requests:
        raise InputError("no request; give at least one")
    check_vocabulary(loaded)
    rows, limits = [], []
    for i, request in enumerate(requests):
        with naming(i, len(requests)):
            rows.append(_read_prompt(loaded.tokenizer, request))
            limits.append(_limit(loaded, len(rows[-1]), max_new_tokens))
    count = bucket(len(rows))
    tokens, lengths = _pad(rows, count, loaded.tokenizer.pad_id)
    seeds, more = np.zeros(count, np.uint32), [0] * (count - len(rows))
    seeds[: len(rows)] = [request.seed for request in requests]
    return Prompts(tokens, lengths, seeds, np.array(limits + more, np.int32))


def _read_prompt(tokenizer: Tokenizer, request: Request) -> list[int]:
    seed = request.seed
    if not is_whole(seed) or not 0 <= seed < 2**32:
        expected = f"a whole number from 0 to {2**32 - 1}"
        raise InputError(f"seed is {shorten(repr(seed))}; expected {expected}")
    return [tokenizer.bos_id, *tokenizer.encode(checked(request.prompt, "prompt"))]


def _limit(loaded: Any, length: int, max_new_tokens: int | None) -> int:
    """How many new tokens a prompt of `length` tokens gets."""
    context = loaded.model.config.context_length
    least = 1 if max_new_tokens is None else max_new_tokens
    if length + least > context:
        raise InputError(
            f"prompt of {length:,} tokens and {least:,} new ones; the context is {context:,}: "
            "shorten it, or ask for fewer"
        )
    if max_new_tokens is not None:
        return max_new_tokens
    return min(getattr(loaded, "max_new_tokens", _USUAL_LENGTH), context - length)


def read_inputs(loaded: Trained, requests: Sequence[Request]) -> Inputs | None:
    """The inputs of all requests as arrays: what a request lacks is masked, what all lack is None.

    Sizes are rounded up to buckets, with as many rows as `read_prompts` makes. None for a model
    that reads prompts alone.

    Raises InputError, naming the request and the part, for what cannot be read.
    """
    model: Any = loaded.model
    encodes = hasattr(model, "encode")
    texts, images, vectors = [], [], []
    for i, request in enumerate(requests):
        with naming(i, len(requests)):
            text, image, aux = request.text or None, request.image, request.aux
            if encodes == (text is None and image is None and aux is None):
                raise InputError(
                    "nothing to answer from: give at least one of text, image and aux"
                    if encodes
                    else "this model reads prompts alone; leave text, image, aux out"
                )
            texts.append(None if text is None else _read_text(loaded, text))
            images.append(None if image is None else load_image(image, model.config.image.size))
            vectors.append(None if aux is None else _read_aux(loaded, aux))
    if not encodes:
        return None
    count, config, arrays = bucket(len(requests)), model.config, {}
    if any(row is not None for row in texts):
        tokens, lengths = _pad([row or [] for row in texts], count, loaded.tokenizer.pad_id)
        arrays |= {"text": tokens, "text_mask": np.arange(tokens.shape[1]) < lengths[:, None]}
    if any(image is not None for image in images):
        blank = np.zeros((config.image.size, config.image.size, 3), np.uint8)
        images += [None] * (count - len(images))
        arrays["image"] = np.stack([blank if image is None else image for image in images])
        arrays["image_mask"] = np.array([image is not None for image in images])
    if any(rows is not None for rows in vectors):
        size = bucket(max(len(rows) for rows in vectors if rows is not None))
        size = min(size, config.max_aux) if config.aux_slots else size
        aux = np.full((count, size, config.aux_dim), np.nan, np.float32)
        for i, rows in enumerate(vectors):
            if rows is not None:
                aux[i, : len(rows)] = rows
        known = np.logical_not(np.isnan(aux).any(axis=-1))
        arrays |= {"aux": np.where(known[..., None], aux, 0), "aux_mask": known}
    return Inputs(**arrays)


def _read_text(loaded: Any, text: Any) -> list[int]:
    row = loaded.tokenizer.encode(checked(text, "text"))
    model: Any = loaded.model
    context = model.config.context_length
    if len(row) > context:
        raise InputError(f"text of {len(row):,} tokens; the context is {context:,}: shorten it")
    return row


def _read_aux(loaded: Any, aux: Any) -> np.ndarray:
    config = loaded.model.config
    if loaded.aux_format is None:
        rows = as_vectors(aux, config.aux_dim)
    else:
        rows = loaded.aux_format.encode(aux, config.aux_dim)
    if config.aux_slots and len(rows) > config.max_aux:
        raise InputError(f"aux of more than max_aux={config.max_aux} vectors; give fewer")
    return rows


def checked(value: Any, name: str) -> str:
    """The text; raises InputError for one that is no text or has special tokens written out."""
    if not isinstance(value, str):
        raise InputError(f"{name} is a {type(value).__name__}; expected a text")
    check_text(value, name)
    return value


def _pad(rows: list[list[int]], count: int, pad_id: int) -> tuple[Any, Any]:
    """`count` right-padded rows and their lengths; rows beyond those given have one pad."""
    tokens = np.full((count, bucket(max(map(len, rows)), LEAST_LENGTH)), pad_id, np.int32)
    lengths = np.ones(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        lengths[i] = len(row)
    return tokens, lengths


@contextlib.contextmanager
def naming(i: int, count: int) -> Iterator[None]:
    """Names the request in an InputError, where there are several."""
    try:
        yield
    except InputError as error:
        if count == 1:
            raise
        raise InputError(f"request {i}: {error}") from None
