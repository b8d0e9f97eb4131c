"""Turns each input that is present into a stream: its tokens, all of width D."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from slam_jax.array_typing import AnyArray
from slam_jax.errors import InputError
from slam_jax.layers.linear import Linear
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.precision import upcast
from slam_jax.layers.short_convolution import ShortConvolution
from slam_jax.slam_v3.config import SlamV3Config
from slam_jax.slam_v3.image_encoder import PretrainedTower, ResNet, ViT


@struct.dataclass
class Inputs:
    """The inputs of a model. Any part may be absent for the whole call (None) or, by its mask, for
    some of the examples; the two give the same result, and None costs nothing.

    text: token ids, right-padded. image: pixels 0..255 of one picture, or of n pictures, at most
    `config.image.max_images`. aux: auxiliary vectors, a set unless the config says slots have a
    meaning. Masks: True = present, None = all present.
    """

    text: Int[AnyArray, "B S_t"] | None = None
    text_mask: Bool[AnyArray, "B S_t"] | None = None
    image: UInt8[AnyArray, "B *n H W 3"] | None = None
    image_mask: Bool[AnyArray, "B *n"] | None = None
    aux: Float[AnyArray, "B A C"] | None = None
    aux_mask: Bool[AnyArray, "B A"] | None = None


# By name: the kind of dtype, how many axes it may have, and what is expected in words.
_EXPECTED: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "text": (jnp.integer, (2,), "token ids [B, S], of a tokenizer"),
    "text_mask": (jnp.bool_, (2,), "True and False [B, S]"),
    "image": (
        jnp.uint8,
        (4, 5),
        "uint8 pixels [B, height, width, 3], or [B, n, height, width, 3] for n pictures",
    ),
    "image_mask": (jnp.bool_, (1, 2), "True and False [B], or [B, n] for n pictures"),
    "aux": (jnp.floating, (3,), "floats [B, number of vectors, aux_dim]"),
    "aux_mask": (jnp.bool_, (2,), "True and False [B, number of vectors]"),
}
_AXES_OF_PIXELS = 3


def check_inputs(inputs: Inputs) -> None:
    """Raises InputError, naming the part, for what would fail later or be misread silently: pixels
    that are no bytes, whole numbers for vectors, a missing batch axis, different batch sizes, a
    mask of another shape than what it masks."""
    sizes = {}
    for name, (kind, ndim, expected) in _EXPECTED.items():
        value = getattr(inputs, name)
        if value is None:
            continue
        if not hasattr(value, "dtype"):
            raise InputError(f"{name} is a {type(value).__name__}; expected an array of {expected}")
        fits = jnp.issubdtype(value.dtype, kind) and value.ndim in ndim
        if not fits or (name == "image" and value.shape[-1] != 3):
            raise InputError(f"{name} is {value.dtype}{list(value.shape)}; expected {expected}")
        sizes[name] = value.shape[0]
    if not sizes.keys() & {"text", "image", "aux"}:
        raise InputError("nothing to encode: give at least one of text, image and aux")
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"inputs of different batch sizes: {shown}; expected one for all")
    for name in ("text", "image", "aux"):
        value, mask = getattr(inputs, name), getattr(inputs, f"{name}_mask")
        if mask is None:
            continue
        if value is None:
            raise InputError(f"{name}_mask without {name}; give both, or neither")
        ndim = value.ndim - _AXES_OF_PIXELS if name == "image" else mask.ndim
        if mask.shape != (shape := value.shape[:ndim]):
            raise InputError(f"{name}_mask is {list(mask.shape)}; expected {list(shape)}")


class Stream(NamedTuple):
    """The tokens of one input, or of several inputs one after the other.

    mask: True = present, None = all present. positions: for the rotary embedding of attention
    inside the stream; None = no rotary positions (images have fixed 2-D features instead).
    """

    tokens: Float[Array, "B S D"]
    mask: Bool[AnyArray, "B S"] | None = None
    positions: Int[Array, "S"] | None = None

    @property
    def visible(self) -> Bool[Array, "B 1 S"] | None:
        """The mask of attention to these tokens, the same for every query."""
        return None if self.mask is None else jnp.asarray(self.mask)[:, None, :]


def join_streams(streams: Sequence[Stream]) -> Stream:
    """The tokens of all streams, one stream after the other, as one stream.

    Tokens without a position get 0, which is no rotation.
    """
    tokens = [s.tokens for s in streams]
    masks = [jnp.ones(s.tokens.shape[:2], bool) if s.mask is None else s.mask for s in streams]
    positions = [
        jnp.zeros(s.tokens.shape[1], jnp.int32) if s.positions is None else s.positions
        for s in streams
    ]
    return Stream(
        jnp.concatenate(tokens, axis=1),
        None if all(s.mask is None for s in streams) else jnp.concatenate(masks, axis=1),
        None if all(s.positions is None for s in streams) else jnp.concatenate(positions),
    )


def split_streams(x: Float[Array, "B S D"], streams: Sequence[Stream]) -> list[Stream]:
    """`streams` with other tokens: x has the tokens of all, one stream after the other."""
    ends = itertools.accumulate(stream.tokens.shape[1] for stream in streams)
    parts = jnp.split(x, list(ends)[:-1], axis=1)
    return [stream._replace(tokens=part) for stream, part in zip(streams, parts, strict=True)]


class Streams(nnx.Module):
    """Turns inputs into streams; an absent input gives none."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        dim, param_dtype = config.embed_dim, kw["param_dtype"]
        self.config, self.dtype = config, kw["dtype"]
        # The norms give all streams the same scale.
        self.text_norm, self.image_norm, self.aux_norm = (
            RMSNorm(dim, param_dtype=param_dtype) for _ in range(3)
        )
        encoders: dict[str, Any] = {"resnet": ResNet, "vit": ViT, "pretrained": PretrainedTower}
        self.text_convolution = (
            ShortConvolution(dim, config.text_kernel_size, param_dtype=param_dtype, rngs=rngs)
            if config.text_kernel_size
            else None
        )
        self.image = encoders[config.image.encoder](config, rngs=rngs)
        # From the width of a language model's embeddings to that of the streams.
        given = config.language_model
        self.text = None if given is None else Linear(given.embed_dim, dim, **kw)
        # In float32 at least: in bfloat16 the number 1,001 would become 1,000.
        exact = {**kw, "dtype": upcast(kw["dtype"])}
        self.aux = Linear(config.aux_dim, dim, use_bias=True, **exact)
        normal = nnx.initializers.normal
        if config.aux_slots:
            self.slot = nnx.Param(normal(0.02)(rngs.params(), (config.max_aux, dim), param_dtype))
        # Large on purpose; tokens have a standard deviation of about 1. Rotary attention can pick a
        # position, such as the token before, only if all tokens have a large part in common.
        self.type = nnx.Param(normal(0.5)(rngs.params(), (3, dim), param_dtype))
        if (most := config.image.max_images) > 1:
            # As large, so that the same picture in two places differs.
            self.image_index = nnx.Param(normal(0.5)(rngs.params(), (most, dim), param_dtype))

    def __call__(
        self, inputs: Inputs, text_embeddings: Float[Array, "B S_t L"] | None
    ) -> list[Stream]:
        """The streams of the present inputs, in the order text, image, aux.

        text_embeddings: the embedded `inputs.text`; the table belongs to the model, which reads
        and writes text with the same one. L is D, or the width of a language model.
        """
        dtype = self.dtype
        types = self.type[...].astype(dtype)[:, None, None]
        streams = []
        if text_embeddings is not None:
            if self.text is not None:
                text_embeddings = self.text(text_embeddings)
            tokens = self.text_norm(text_embeddings)
            if self.text_convolution is not None:
                tokens = self.text_convolution(tokens, inputs.text_mask)
            tokens = tokens + types[0]
            streams.append(Stream(tokens, inputs.text_mask, jnp.arange(tokens.shape[1])))
        if inputs.image is not None:
            streams.append(self._images(inputs.image, inputs.image_mask, types[1]))
        if inputs.aux is not None:
            tokens = self.aux_norm(self._aux(jnp.asarray(inputs.aux)).astype(dtype)) + types[2]
            streams.append(Stream(tokens, inputs.aux_mask))
        return streams

    def _images(
        self,
        image: UInt8[AnyArray, "B *n H W 3"],
        mask: Bool[AnyArray, "B *n"] | None,
        image_type: Float[Array, "1 1 D"],
    ) -> Stream:
        """The tokens of the first picture of each example, then those of the second, and so on."""
        rows, most = image.shape[0], self.config.image.max_images
        count = image.shape[1] if image.ndim > 4 else 1
        if count > most:
            problem = f"{count} pictures an example, expected at most image.max_images={most}"
            raise InputError(problem)
        pixels = jnp.asarray(image, upcast(self.dtype)) / 127.5 - 1.0
        pixels = pixels.astype(self.dtype).reshape(-1, *image.shape[-3:])
        tokens = self.image_norm(self.image(pixels)) + image_type
        size, dim = tokens.shape[1:]
        if most > 1:
            index = self.image_index[:count].astype(tokens.dtype)[None, :, None]
            tokens = (tokens.reshape(rows, count, size, dim) + index).reshape(rows, -1, dim)
        if mask is not None:
            mask = jnp.repeat(mask.reshape(rows, count), size, axis=1)
        return Stream(tokens, mask)

    def _aux(self, aux: Float[Array, "B A C"]) -> Float[Array, "B A D"]:
        config, (count, width) = self.config, aux.shape[1:]
        if width != config.aux_dim:
            raise InputError(f"aux vectors of {width} numbers, expected aux_dim={config.aux_dim}")
        tokens = self.aux(aux)
        if not config.aux_slots:
            return tokens
        if count > config.max_aux:
            raise InputError(f"{count} aux vectors, expected at most max_aux={config.max_aux}")
        return tokens + self.slot[:count].astype(tokens.dtype)[None]
