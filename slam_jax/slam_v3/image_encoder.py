"""The image encoders: pixels to image tokens."""

import functools

import einops
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from slam_jax.errors import InputError
from slam_jax.layers.linear import Linear
from slam_jax.layers.norms import RMSNorm
from slam_jax.layers.stacked import equal_layers, run_layers
from slam_jax.slam_v3.block import TransformerBlock
from slam_jax.slam_v3.config import SlamV3Config


def grid_positions(height: int, width: int, dim: int) -> Float[Array, "S D"]:
    """Fourier features of row and column, row-major: sine and cosine, `dim` / 4 (whole) of each.

    A coordinate x runs from -1 to 1 over the grid. The features are sin and cos of pi f x for
    frequencies f from 1/2 to half of the grid's size, its Nyquist frequency. The usual frequencies
    1 / 10000^(2i/D) would be almost constant on the small grid of an image.
    Source: Jaegle et al. 2021, "Perceiver", section 3.2.
    """

    def waves(size: int) -> Float[Array, "size features"]:
        place = jnp.linspace(-1.0, 1.0, size) if size > 1 else jnp.zeros(1)
        frequencies = jnp.linspace(0.5, max(size / 2, 0.5), dim // 4)
        angle = jnp.pi * place[:, None] * frequencies[None]
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    of_row = jnp.repeat(waves(height), width, axis=0)
    of_column = jnp.tile(waves(width), (height, 1))
    return jnp.concatenate([of_row, of_column], axis=-1)


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
        # A window extends half a patch beyond its patch on every side, so that windows overlap.
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
        self.total_stride = image.total_stride
        self.project = Linear(width, config.embed_dim, use_bias=True, **kw)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B S D"]:
        if max(pixels.shape[1:3]) <= self.total_stride:
            raise InputError(
                f"image of {pixels.shape[1]} x {pixels.shape[2]} pixels: expected a side of "
                f"more than {self.total_stride}; enlarge it, or take fewer stages or a smaller "
                "patch_size"
            )
        x = self.stem(pixels)
        for block in self.blocks:
            x = block(x)
        x = self.project(self.norm(x))
        places = grid_positions(*x.shape[1:]).astype(x.dtype)
        return einops.rearrange(x, "B h w D -> B (h w) D") + places[None]


class ViT(nnx.Module):
    """Patches projected, 2-D positions, transformer blocks.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1, with the fixed
    2-D positions of `grid_positions` and no class token.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        kw, num_layers = dict(**config.dtypes, rngs=rngs), config.image.num_layers
        self.patch, self.remat = config.image.patch_size, config.remat
        self.project = Linear(3 * self.patch**2, config.embed_dim, use_bias=True, **kw)
        block = functools.partial(TransformerBlock, config)
        self.blocks = equal_layers(config.scan_layers, num_layers, block, rngs=rngs)
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
        x = x + grid_positions(rows, columns, x.shape[-1]).astype(x.dtype)[None]
        x, _ = run_layers(
            lambda block, x, _: (block(x), None),
            self.blocks,
            x,
            [None] * len(self.blocks),
            policy=self.remat,
        )
        return self.norm(x)


class PretrainedTower(nnx.Module):
    """A published vision tower: the tokens of its patches, projected to the width of the model.

    Pixels are normalised as the publisher does. Positions are those of the tower, which are
    interpolated for images of another size.
    """

    def __init__(self, config: SlamV3Config, *, rngs: nnx.Rngs):
        from slam_jax.vision_models import VisionTower  # only where there is a tower

        self.layer, self.preprocessing = config.image.layer, config.image.preprocessing
        self.tower = VisionTower(config.tower, rngs=rngs)
        width, kw = config.tower.embed_dim, dict(**config.dtypes, rngs=rngs)
        self.project = Linear(width, config.embed_dim, use_bias=True, **kw)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B S D"]:
        """pixels: from -1 for 0 to 1 for 255, as all image encoders take them."""
        how, values = self.preprocessing, (pixels + 1) * 127.5
        mean, std = (jnp.asarray(x, pixels.dtype)[None, None, None] for x in (how.mean, how.std))
        normalised = (values * how.scale - mean) / std
        return self.project(self.tower.patches(normalised, self.layer))
