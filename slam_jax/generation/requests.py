"""From what a person has to arrays of a few fixed shapes."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, UInt32

from slam_jax.data.images import load_image
from slam_jax.data.numbers import AuxFormat, as_vectors
from slam_jax.data.tokenizer import Tokenizer, check_text
from slam_jax.errors import InputError, is_whole, shorten
from slam_jax.protocol import Decodable
from slam_jax.slam_v3.streams import Inputs

_LEAST_LENGTH = 16


@runtime_checkable
class Trained(Protocol):
    """A model with what it takes to talk to it; `slam_jax.load` returns one.

    The model has a `config` with `context_length`, and with `image` and `aux_dim` (see
    `SlamV3Config`) where it reads more than prompts.
    """

    @property
    def model(self) -> Decodable: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def aux_format(self) -> AuxFormat | None: ...


class ModelAndTokenizer(NamedTuple):
    """A model that reads prompts alone, such as a language model, ready to be talked to."""

    model: Any
    tokenizer: Tokenizer
    aux_format: None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """A question and what it is about: any mix of text, image and aux, at least one of them.

    prompt: what the answer continues.
    text: may be empty, which is as good as none.
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
    """Prompts as right-padded tokens; rows that are there to fill the shape are not valid."""

    tokens: Int[np.ndarray, "R T"]
    lengths: Int[np.ndarray, "R"]
    seeds: UInt32[np.ndarray, "R"]
    valid: Bool[np.ndarray, "R"]


def bucket(size: int, least: int = 1) -> int:
    """The smallest power of two times `least` that is not below `size`: a shape that many share."""
    while least < size:
        least *= 2
    return least


def read_prompts(loaded: Trained, requests: Sequence[Request], max_new_tokens: int) -> Prompts:
    """The prompts, each after a <bos>, in a bucket's rows and columns.

    Raises InputError where there is none, or one with its answer is longer than the context.
    """
    if not requests:
        raise InputError("no request; give at least one")
    tokenizer, context = loaded.tokenizer, _context_length(loaded.model)
    rows = []
    for i, request in enumerate(requests):
        with naming(i, len(requests)):
            seed = request.seed
            if not is_whole(seed) or not 0 <= seed < 2**32:
                expected = f"a whole number from 0 to {2**32 - 1}"
                raise InputError(f"seed is {shorten(repr(seed))}; expected {expected}")
            row = [tokenizer.bos_id, *tokenizer.encode(checked(request.prompt, "prompt"))]
            if len(row) + max_new_tokens > context:
                raise InputError(
                    f"prompt of {len(row):,} tokens and {max_new_tokens:,} new ones; the context "
                    f"is {context:,}: shorten it, or ask for fewer"
                )
            rows.append(row)
    count = bucket(len(rows))
    tokens, lengths = _pad(rows, count, tokenizer.pad_id)
    seeds = np.zeros(count, np.uint32)
    seeds[: len(rows)] = [request.seed for request in requests]
    return Prompts(tokens, lengths, seeds, np.arange(count) < len(rows))


def read_inputs(loaded: Trained, requests: Sequence[Request]) -> Inputs | None:
    """The inputs of all requests in one; what a request lacks is masked, what all lack is None.

    Shapes are those of buckets, as many rows as `read_prompts` makes. None for a model that reads
    prompts alone.

    Raises InputError, naming the request and the part, for what cannot be read.
    """
    parts = [(request.text or None, request.image, request.aux) for request in requests]
    if not hasattr(loaded.model, "encode"):
        for i, part in enumerate(parts):
            with naming(i, len(parts)):
                if any(value is not None for value in part):
                    raise InputError("this model reads prompts alone; leave text, image, aux out")
        return None
    for i, part in enumerate(parts):
        with naming(i, len(parts)):
            if all(value is None for value in part):
                raise InputError("nothing to answer from: give at least one of text, image and aux")
    texts, images, auxs = (list(column) for column in zip(*parts, strict=True))
    count = bucket(len(requests))
    arrays = _texts(loaded, texts, count)
    arrays |= _images(loaded, images, count)
    return Inputs(**arrays, **_aux(loaded, auxs, count))


def _texts(loaded: Any, texts: list[Any], count: int) -> dict[str, Any]:
    if all(text is None for text in texts):
        return {}
    context, rows = _context_length(loaded.model), []
    for i, text in enumerate(texts):
        with naming(i, len(texts)):
            row = [] if text is None else loaded.tokenizer.encode(checked(text, "text"))
            if len(row) > context:
                raise InputError(
                    f"text of {len(row):,} tokens; the context is {context:,}: shorten it"
                )
            rows.append(row)
    tokens, lengths = _pad(rows, count, loaded.tokenizer.pad_id)
    return {"text": tokens, "text_mask": np.arange(tokens.shape[1]) < lengths[:, None]}


def checked(value: Any, name: str) -> str:
    """The text, or an InputError for what is none or has special tokens written out."""
    if not isinstance(value, str):
        raise InputError(f"{name} is a {type(value).__name__}; expected a text")
    check_text(value, name)
    return value


def _images(loaded: Any, images: list[Any], count: int) -> dict[str, Any]:
    if all(image is None for image in images):
        return {}
    size = loaded.model.config.image.size
    pixels = np.zeros((count, size, size, 3), np.uint8)
    for i, image in enumerate(images):
        with naming(i, len(images)):
            if image is not None:
                pixels[i] = load_image(image, size)
    present = [image is not None for image in images]
    return {"image": pixels, "image_mask": np.array(present + [False] * (count - len(present)))}


def _aux(loaded: Any, auxs: list[Any], count: int) -> dict[str, Any]:
    if all(aux is None for aux in auxs):
        return {}
    config, rows = loaded.model.config, []
    for i, aux in enumerate(auxs):
        with naming(i, len(auxs)):
            rows.append(np.zeros((0, config.aux_dim)) if aux is None else _vectors(loaded, aux))
    longest = max(len(row) for row in rows)
    longest = min(bucket(longest), config.max_aux) if config.aux_slots else bucket(longest)
    if longest < max(len(row) for row in rows):
        raise InputError(f"aux of more than max_aux={config.max_aux} vectors; give fewer")
    vectors = np.zeros((count, longest, config.aux_dim), np.float32)
    mask = np.zeros((count, longest), bool)
    for i, row in enumerate(rows):
        known = ~np.isnan(row).any(axis=-1)
        vectors[i, : len(row)] = np.where(known[:, None], row, 0)
        mask[i, : len(row)] = known
    return {"aux": vectors, "aux_mask": mask}


def _vectors(loaded: Any, aux: Any) -> np.ndarray:
    width = loaded.model.config.aux_dim
    if loaded.aux_format is None:
        return as_vectors(aux, width)
    return loaded.aux_format.encode(aux, width)


def _pad(rows: list[list[int]], count: int, pad_id: int) -> tuple[Any, Any]:
    """Right-padded rows and their lengths; rows beyond them have one pad, so that none is empty."""
    longest = bucket(max(map(len, rows)), _LEAST_LENGTH)
    tokens = np.full((count, longest), pad_id, np.int32)
    lengths = np.ones(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        lengths[i] = len(row)
    return tokens, lengths


def _context_length(model: Any) -> int:
    return model.config.context_length


@contextlib.contextmanager
def naming(i: int, count: int) -> Iterator[None]:
    """Puts before an InputError which of several requests it is about."""
    try:
        yield
    except InputError as error:
        if count == 1:
            raise
        raise InputError(f"request {i}: {error}") from None
