"""Turns each present input into a stream of tokens of width D."""

from typing import Any, NamedTuple

import einops
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from slam_jax.array_typing import AnyArray
from slam_jax.errors import InputError
from slam_jax.layers.linear import Linear
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.precision import upcast
from slam_jax.layers.remat import remat
from slam_jax.slam_v3.block import TransformerBlock
from slam_jax.slam_v3.config import SlamV3Config


@struct.dataclass
class Inputs:
    """The inputs of a model. Any part may be absent for the whole call (None) or, by its mask, for
    some of the examples; the two give the same result, and None costs nothing.

    text: token ids, right-padded. image: pixels 0..255. aux: auxiliary vectors, a set unless the
    config says slots have a meaning. Masks: True = present, None = all present.
    """

    text: Int[AnyArray, "B S_t"] | None = None
    text_mask: Bool[AnyArray, "B S_t"] | None = None
    image: UInt8[AnyArray, "B H W 3"] | None = None
    image_mask: Bool[AnyArray, "B"] | None = None
    aux: Float[AnyArray, "B A C"] | None = None
    aux_mask: Bool[AnyArray, "B A"] | None = None


_EXPECTED: dict[str, tuple[Any, int, str]] = {
    "text": (jnp.integer, 2, "token ids [B, S], of a tokenizer"),
    "text_mask": (jnp.bool_, 2, "True and False [B, S]"),
    "image": (jnp.uint8, 4, "uint8 pixels [B, height, width, 3]"),
    "image_mask": (jnp.bool_, 1, "True and False [B]"),
    "aux": (jnp.floating, 3, "floats [B, number of vectors, aux_dim]"),
    "aux_mask": (jnp.bool_, 2, "True and False [B, number of vectors]"),
}


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
        fits = jnp.issubdtype(value.dtype, kind) and value.ndim == ndim
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
        if mask.shape != (shape := value.shape[: mask.ndim]):
            raise InputError(f"{name}_mask is {list(mask.shape)}; expected {list(shape)}")


class Stream(NamedTuple):
    """The tokens of one input.

    mask: True = present, None = all present. positions: for the rotary embedding of attention
    inside the stream; None = no rotary positions (images have fixed 2-D features instead).
    """

    tokens: Float[Array, "B S D"]
    mask: Bool[AnyArray, "B S"] | None
    positions: Int[Array, "S"] | None


def grid_positions(height: int, width: int, dim: int) -> Float[Array, "S D"]:
    """Fourier features of row and column, row-major: sine and cosine, `dim` / 4 (whole) of each.

    A coordinate x runs from -1 to 1 over the grid. The features are sin and cos of pi f x for
    frequencies f from 1/2 to half of the grid's size, its Nyquist frequency. The usual frequencies
    1 / 10000^(2i/D) would be almost constant on the small grid of an image.
    Source: Jaegle et al. 2021, "Perceiver", section 3.2.
    """
    features = []
    for size, axis in ((height, 0), (width, 1)):
        place = jnp.linspace(-1.0, 1.0, size) if size > 1 else jnp.zeros(1)
        angle = jnp.outer(jnp.pi * place, jnp.linspace(0.5, max(size / 2, 0.5), dim // 4))
        waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
        waves = jnp.expand_dims(waves, 1 - axis)
        features.append(jnp.broadcast_to(waves, (height, width, waves.shape[-1])))
    return jnp.concatenate(features, axis=-1).reshape(height * width, -1)


class ResidualBlock(nnx.Module):
    """Pre-activation residual block: norm, silu, 3x3 convolution, twice; `stride` at the first.

    Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", figure 4(e), with
    GroupNorm (Wu & He 2018) for batch norm: no statistics shared between examples.
    """

    def __init__(self, width_in: int, width: int, stride: int, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm1 = nnx.GroupNorm(width_in, num_groups=None, group_size=8, **kw)
        self.conv1 = nnx.Conv(width_in, width, (3, 3), stride, use_bias=False, **kw)
        self.norm2 = nnx.GroupNorm(width, num_groups=None, group_size=8, **kw)
        self.conv2 = nnx.Conv(width, width, (3, 3), use_bias=False, **kw)
        same = stride == 1 and width_in == width
        self.shortcut = (
            None if same else nnx.Conv(width_in, width, (1, 1), stride, use_bias=False, **kw)
        )

    def __call__(self, x: Float[Array, "B H W channels"]) -> Float[Array, "B h w channels_out"]:
        h = nnx.silu(self.norm1(x))
        x = x if self.shortcut is None else self.shortcut(h)
        h = nnx.silu(self.norm2(self.conv1(h)))
        return x + self.conv2(h)


class ResNet(nnx.Module):
    """A strided stem and residual stages; every stage after the first halves the grid."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        image = config.image
        widths, patch = image.stage_widths, image.patch_size
        # Windows overlap by a third on each side, so that no edge is lost between two of them.
        window = patch + 2 * (patch // 2)
        self.stem = nnx.Conv(3, widths[0], (window, window), patch, **kw)
        blocks, width = [], widths[0]
        for stage, stage_width in enumerate(widths):
            for block in range(image.blocks_per_stage):
                stride = 2 if stage and not block else 1
                blocks.append(ResidualBlock(width, stage_width, stride, **kw))
                width = stage_width
        self.blocks = nnx.List(blocks)
        # One group per channel: the norm removes what a channel has in common over the whole
        # picture, such as the background.
        self.norm = nnx.GroupNorm(width, num_groups=width, **kw)
        self.reach = image.reach
        self.project = Linear(width, config.embed_dim, use_bias=True, **kw)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B S D"]:
        if max(pixels.shape[1:3]) <= self.reach:
            raise InputError(
                f"image of {pixels.shape[1]} x {pixels.shape[2]} pixels: expected more than "
                f"{self.reach} a side; enlarge it, or take fewer stages or a smaller patch_size"
            )
        x = self.stem(pixels)
        for block in self.blocks:
            x = block(x)
        x = self.project(self.norm(x))
        _, height, width, dim = x.shape
        positions = grid_positions(height, width, dim)[None].astype(x.dtype)
        return einops.rearrange(x, "B h w D -> B (h w) D") + positions


class ViT(nnx.Module):
    """Patches projected, 2-D positions, transformer blocks.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1, with the fixed
    2-D positions of `grid_positions` and no class token.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        self.patch, self.remat = config.image.patch_size, config.remat
        self.project = Linear(3 * self.patch**2, config.embed_dim, use_bias=True, **kw)
        self.blocks = nnx.List(
            [TransformerBlock(config, rngs=rngs) for _ in range(config.image.num_layers)]
        )
        self.norm = RMSNorm(config.embed_dim, param_dtype=kw["param_dtype"])

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B S D"]:
        rows, columns = (side // self.patch for side in pixels.shape[1:3])
        if pixels.shape[1:3] != (rows * self.patch, columns * self.patch):
            raise InputError(
                f"image of {pixels.shape[1]} x {pixels.shape[2]} pixels: "
                f"expected multiples of the patch size {self.patch}; resize or pad it"
            )
        patches = einops.rearrange(
            pixels, "B (h p) (w q) C -> B (h w) (p q C)", p=self.patch, q=self.patch
        )
        x = self.project(patches)
        x = x + grid_positions(rows, columns, x.shape[-1])[None].astype(x.dtype)
        for block in self.blocks:
            x = remat(block, self.remat)(x)
        return self.norm(x)


class Streams(nnx.Module):
    """All input pipelines; absent inputs leave no stream."""

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw = dict(**config.dtypes, rngs=rngs)
        self.config = config
        norms = [RMSNorm(config.embed_dim, param_dtype=kw["param_dtype"]) for _ in range(3)]
        # The norms give all streams the same scale.
        self.text_norm, self.image_norm, self.aux_norm = norms
        encoder = ResNet if config.image.encoder == "resnet" else ViT
        self.image = encoder(config, rngs=rngs)
        # In float32 at least: in bfloat16 the number 1,001 would become 1,000.
        exact = {**kw, "dtype": upcast(kw["dtype"])}
        self.aux = Linear(config.aux_dim, config.embed_dim, use_bias=True, **exact)
        embedding = nnx.initializers.normal(0.02)
        if config.aux_slots:
            slots = (config.max_aux, config.embed_dim)
            self.slot = nnx.Param(embedding(rngs.params(), slots, kw["param_dtype"]))
        types = (3, config.embed_dim)
        # A standard deviation of 0.5 is half of a token's. Attention by position alone, such as to
        # the token before, needs a large part that all tokens of a stream have in common.
        normal = nnx.initializers.normal(0.5)
        self.type = nnx.Param(normal(rngs.params(), types, kw["param_dtype"]))

    def __call__(
        self, inputs: Inputs, text_embeddings: Float[Array, "B S_t D"] | None
    ) -> list[Stream]:
        """The present streams, in the order text, image, aux.

        text_embeddings: the embedded `inputs.text`; the table belongs to the model, which reads
        and writes text with the same one.
        """
        dtype = self.config.dtypes["dtype"]
        types = self.type[:, None, None].astype(dtype)
        streams = []
        if text_embeddings is not None:
            positions = jnp.arange(text_embeddings.shape[1])
            streams.append(
                Stream(self.text_norm(text_embeddings) + types[0], inputs.text_mask, positions)
            )
        if inputs.image is not None:
            pixels = jnp.asarray(inputs.image, upcast(dtype)) / 127.5 - 1.0
            tokens = self.image_norm(self.image(pixels.astype(dtype))) + types[1]
            mask = inputs.image_mask
            if mask is not None:
                mask = jnp.broadcast_to(mask[:, None], tokens.shape[:2])
            streams.append(Stream(tokens, mask, None))
        if inputs.aux is not None:
            tokens = self.aux_norm(self._aux(jnp.asarray(inputs.aux)).astype(dtype)) + types[2]
            streams.append(Stream(tokens, inputs.aux_mask, None))
        return streams

    def _aux(self, aux):
        count, width = aux.shape[1:]
        if width != self.config.aux_dim:
            raise InputError(
                f"aux vectors of {width} numbers, expected aux_dim={self.config.aux_dim}"
            )
        tokens = self.aux(aux)
        if not self.config.aux_slots:
            return tokens
        if count > self.config.max_aux:
            raise InputError(f"{count} aux vectors, expected at most max_aux={self.config.max_aux}")
        return tokens + self.slot[None, :count].astype(tokens.dtype)
