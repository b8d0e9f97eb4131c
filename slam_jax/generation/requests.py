"""Requests, and their conversion into arrays of a few fixed shapes."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt32

from slam_jax.data.chat import check_messages
from slam_jax.data.hub_tokenizer import as_tokenizer
from slam_jax.data.images import as_pictures, load_image
from slam_jax.data.numbers import AuxFormat, as_vectors
from slam_jax.data.pipeline import stack_pictures
from slam_jax.data.rows import too_many
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.errors import InputError, is_whole, shorten
from slam_jax.generation.decode import LEAST_LENGTH, bucket, bucket_rows, check_context
from slam_jax.protocol import Decodable
from slam_jax.slam_v3.streams import Inputs

_USUAL_LENGTH = 32


@runtime_checkable
class Trained(Protocol):
    """A model with its tokenizer and the format of its numbers; `slam_jax.load` returns one.

    The model has a `config` with `vocab_size` and `context_length`, and with `image` and `aux_dim`
    (see `SlamV3Config`) where it reads more than prompts. An attribute `max_new_tokens` is the
    default length of answers; without one it is 32. An attribute `resize` is how pictures become
    square, one of `RESIZE_POLICIES`; without one it is the first.
    """

    @property
    def model(self) -> Decodable: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def aux_format(self) -> AuxFormat | None: ...


@dataclasses.dataclass(frozen=True)
class ModelAndTokenizer:
    """A model that reads prompts alone, such as a language model, and its tokenizer.

    tokenizer: a `Tokenizer`; or one of the hub: a `HubTokenizer`, a folder, a tokenizer.json, a
      `tokenizers.Tokenizer` or a fast tokenizer of transformers. It becomes one of the first two.

    Raises InputError as `check_vocabulary` does.
    """

    model: Any
    tokenizer: Any
    aux_format: None = None
    max_new_tokens: int = _USUAL_LENGTH

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", as_tokenizer(self.tokenizer))
        check_vocabulary(self)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and what it is about: any mix of text, image and aux, at least one of them
    (none where a memory is given, or the model reads prompts alone).

    prompt: what the answer continues.
    text: an empty one counts as None.
    image: a path, the bytes of a file, a PIL image, or an array of bytes [H, W, 3], of any size. Or
      a list of several, for a model that was trained on several.
    aux: rows of numbers as the model was trained on; for a model of a table's columns, numbers by
      column name.
    seed: of sampling. The same request with the same seed has the same answer, alone or in a batch.
    messages: instead of a prompt, a conversation for a model with a chat template: each message has
      a "role" and a "content".
    """

    prompt: str = ""
    text: str | None = None
    image: Any = None
    aux: Any = None
    seed: int = 0
    messages: Sequence[Mapping[str, Any]] | None = None


class Prompts(NamedTuple):
    """Right-padded prompts. limits: new tokens of each at most, 0 for rows that fill the shape."""

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B"]
    seeds: UInt32[np.ndarray, "B"]
    limits: Int32[np.ndarray, "B"]


def check_vocabulary(loaded: Any) -> None:
    """Raises InputError unless the tokenizer has as many tokens as the model.

    Published models may have more rows than their tokenizer has tokens; see `allowed_tokens`.
    """
    ours, models = loaded.tokenizer.vocab_size, loaded.model.config.vocab_size
    if ours > models or (ours < models and isinstance(loaded.tokenizer, Tokenizer)):
        raise InputError(
            f"the tokenizer has {ours:,} tokens and the model {models:,}; give the tokenizer that "
            "the model was trained with"
        )


def allowed_tokens(loaded: Any) -> Bool[np.ndarray, "V"] | None:
    """The rows of the model's vocabulary that are tokens; None = all are."""
    known, models = loaded.tokenizer.known, loaded.model.config.vocab_size
    if known is None or (len(known) == models and known.all()):
        return None
    return np.pad(known, (0, models - len(known)))


def read_prompts(
    loaded: Trained,
    requests: Sequence[Request],
    max_new_tokens: int | None,
    context: int | None = None,
) -> Prompts:
    """The prompts, with rows and columns rounded up to a bucket. Each begins as the tokenizer says:
    with a <bos>, or without.

    max_new_tokens: None = the default of the model, or what is left of the context. context: tokens
    of a prompt and its answer, None = those of the model.

    Raises InputError where there is no request, where a prompt with its answer is longer than the
    context, or as `check_vocabulary` does.
    """
    if not requests:
        raise InputError("no request; give at least one")
    check_vocabulary(loaded)
    model: Any = loaded.model
    rows, limits = [], []
    most: int = model.config.context_length if context is None else context
    for i, request in enumerate(requests):
        with naming(i, len(requests)):
            if not is_whole(request.seed) or not 0 <= request.seed < 2**32:
                expected = f"a whole number from 0 to {2**32 - 1}"
                raise InputError(f"seed is {shorten(repr(request.seed))}; expected {expected}")
            rows.append(_read_prompt(loaded.tokenizer, request, most))
            length = len(rows[-1])
            check_context(length, 1 if max_new_tokens is None else max_new_tokens, most)
            usual = min(getattr(loaded, "max_new_tokens", _USUAL_LENGTH), most - length)
            limits.append(usual if max_new_tokens is None else max_new_tokens)
    seeds = np.array([request.seed for request in requests], np.uint32)
    prompts = Prompts(*_pad(rows, loaded.tokenizer.pad_id), seeds, np.array(limits, np.int32))
    prompts = bucket_rows(prompts, len(rows))
    prompts.limits[len(rows) :] = 0
    return prompts


def _read_prompt(tokenizer: Any, request: Request, context: int) -> list[int]:
    """The tokens of a prompt or of a conversation."""
    prompt = checked(tokenizer, request.prompt, "prompt")
    if request.messages is None:
        _check_size(tokenizer, [prompt], "prompt", context)
        return tokenizer.encode_prompt(prompt)
    if prompt:
        raise InputError("a request has a prompt and messages; give one of them")
    if tokenizer.chat_template is None:
        raise InputError("this model has no chat template; give it a prompt instead of messages")
    check_messages(request.messages)
    contents = [message.get("content") for message in request.messages]
    texts = [content for content in contents if isinstance(content, str)]
    _check_size(tokenizer, texts, "prompt", context)
    return tokenizer.encode_chat(request.messages)


def _check_size(tokenizer: Any, texts: Sequence[str], name: str, context: int) -> None:
    """Refuses what has no room even as the longest tokens, before it becomes tokens: that takes a
    minute and gigabytes for some megabytes."""
    size, longest = sum(map(len, texts)), _longest_token(tokenizer)
    if size > context * longest:
        raise InputError(
            f"{name} of {size:,} characters; the context is {context:,} tokens of at most "
            f"{longest:,}: shorten it"
        )


@functools.lru_cache(maxsize=16)
def _longest_token(tokenizer: Any) -> int:
    """In characters. A part of a letter counts as one at least."""
    return max(map(len, tokenizer.ids_by_token))


def append_answers(
    prompts: Prompts, answers: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[np.ndarray, "answers T"], Bool[np.ndarray, "answers T-1"]]:
    """The first prompt followed by each answer, in a bucket of shapes, and a mask: True = this
    position predicts a token of the answer."""
    prompt = prompts.tokens[0, : prompts.lengths[0]].tolist()
    tokens, lengths = bucket_rows(_pad([[*prompt, *row] for row in answers], pad_id), len(answers))
    positions = np.arange(tokens.shape[1] - 1) + 1
    return tokens, (positions >= len(prompt)) & (positions < lengths[:, None])


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
            text, aux = request.text or None, request.aux
            is_empty = text is None and aux is None and not as_pictures(request.image)
            if encodes and is_empty:
                raise InputError("nothing to answer from: give at least one of text, image and aux")
            if not encodes and not is_empty:
                raise InputError("this model reads prompts alone; leave text, image, aux out")
            texts.append([] if text is None else _read_text(loaded, text))
            images.append(read_pictures(loaded, request.image) if encodes else ())
            vectors.append(None if aux is None else _read_aux(loaded, aux))
    if not encodes:
        return None
    config, arrays = model.config, {}
    if any(texts):
        tokens, lengths = _pad(texts, loaded.tokenizer.pad_id)
        arrays |= {"text": tokens, "text_mask": np.arange(tokens.shape[1]) < lengths[:, None]}
    if most := max(map(len, images)):
        count = min(bucket(most), config.image.max_images)
        arrays |= stack_pictures(images, count, (config.image.size,) * 2)
        if config.image.max_images == 1:
            arrays |= {name: arrays[name][:, 0] for name in ("image", "image_mask")}
    if given := [(i, rows) for i, rows in enumerate(vectors) if rows is not None]:
        size = bucket(max(len(rows) for _, rows in given))
        size = min(size, config.max_aux) if config.aux_slots else size
        aux = np.full((len(vectors), size, config.aux_dim), np.nan, np.float32)
        for i, rows in given:
            aux[i, : len(rows)] = rows
        # NaN is an absent vector or one with a missing number: masked, and stored as 0.
        known = np.logical_not(np.isnan(aux).any(axis=-1))
        arrays |= {"aux": np.where(known[..., None], aux, 0), "aux_mask": known}
    return bucket_rows(Inputs(**arrays), len(requests))


def read_pictures(loaded: Any, image: Any) -> list[np.ndarray]:
    """The pictures of a request as the model was trained on them, [size, size, 3] each.

    Raises InputError as `load_image` does, and for more than the model reads.
    """
    config, pictures = loaded.model.config.image, as_pictures(image)
    if len(pictures) > config.max_images:
        raise InputError(f"image: {too_many(len(pictures), config.max_images)}")
    how = config.preprocessing or getattr(loaded, "resize", None)
    return [load_image(picture, config.size, how) for picture in pictures]


def _read_text(loaded: Any, text: Any) -> list[int]:
    context = loaded.model.config.context_length
    _check_size(loaded.tokenizer, [checked(loaded.tokenizer, text, "text")], "text", context)
    row = loaded.tokenizer.encode(text)
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


def checked(tokenizer: Any, value: Any, name: str) -> str:
    """The text; raises InputError for another type, and for what the tokenizer cannot encode."""
    if not isinstance(value, str):
        raise InputError(f"{name} is a {type(value).__name__}; expected a text")
    tokenizer.check(value, name)
    return value


def _pad(rows: list[list[int]], pad_id: int) -> tuple[Any, Any]:
    """Right-padded rows and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.full((len(rows), bucket(int(lengths.max()), LEAST_LENGTH)), pad_id, np.int32)
    for row, tokens_of_row in zip(rows, tokens, strict=True):
        tokens_of_row[: len(row)] = row
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
