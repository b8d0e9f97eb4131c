"""The vision transformer of ViT, DINOv2, CLIP and SigLIP.

They differ in the few switches of `VisionConfig`.

Sources: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words" (arXiv 2010.11929), section 3.1;
Radford et al. 2021, "CLIP" (arXiv 2103.00020), section 2.4; Oquab et al. 2023, "DINOv2" (arXiv
2304.07193), section 5; Darcet et al. 2024, "Vision Transformers Need Registers" (arXiv 2309.16588),
section 2.2; Zhai et al. 2023, "SigLIP" (arXiv 2303.15343), section 3.
"""

from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Shaped

from slam_jax.array_typing import AnyArray
from slam_jax.errors import InputError
from slam_jax.layers.attention import SelfAttention
from slam_jax.layers.linear import Linear
from slam_jax.layers.mlp import MLP, GatedMLP
from slam_jax.layers.precision import precise
from slam_jax.layers.stacked import equal_layers, run_layers
from slam_jax.vision_models.config import ACTIVATIONS, VisionConfig


def bicubic_weights(new: int, old: int, *, antialias: bool) -> Float[np.ndarray, "{new} {old}"]:
    """The weight of each old value in each new one, for bicubic interpolation along one axis.

    As in `torch.nn.functional.interpolate` with `align_corners=False`. Without antialias the cubic
    has a = -0.75, and what is beyond a border counts as the value at the border. With it a = -0.5,
    the cubic is as wide as the new values are apart, and its part beyond a border is left out.

    Source: Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing", section 2.
    """
    a, width = (-0.5, max(old / new, 1.0)) if antialias else (-0.75, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    reach = int(2 * width) + 1
    taps = np.floor(centre).astype(int) + np.arange(-reach, reach + 1)
    x = np.abs(taps - centre) / width
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    if antialias:
        weights = np.where((taps >= 0) & (taps < old), weights, 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
    found = np.zeros((new, old))
    np.add.at(found, (np.arange(new)[:, None], np.clip(taps, 0, old - 1)), weights)
    return found.astype(np.float32)


class VisionBlock(nnx.Module):
    """x += scale * attention(norm(x)); x += scale * mlp(norm(x)), with LayerNorms and biases.

    The scales are those of DINOv2 (Touvron et al. 2021, "Going Deeper with Image Transformers",
    section 2).
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, rngs=rngs)
        dim = config.embed_dim

        def scale() -> nnx.Param | None:
            return nnx.Param(jnp.ones(dim, kw["param_dtype"])) if config.kind.layer_scale else None

        self.attention_norm = _layer_norm(config, rngs)
        self.attention = SelfAttention(
            dim, config.num_heads, config.head_dim, qkv_bias=config.qkv_bias, out_bias=True, **kw
        )
        self.attention_scale = scale()
        self.mlp_norm = _layer_norm(config, rngs)
        if config.swiglu:
            self.mlp = GatedMLP(dim, config.hidden_dim, use_bias=True, **kw)
        else:
            activation = ACTIVATIONS[config.activation]
            self.mlp = MLP(dim, config.hidden_dim, activation=activation, use_bias=True, **kw)
        self.mlp_scale = scale()

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        x = x + _scaled(self.attention(self.attention_norm(x)), self.attention_scale)
        return x + _scaled(self.mlp(self.mlp_norm(x)), self.mlp_scale)


class VisionTower(nnx.Module):
    """Patches projected, class token and registers, learned positions, transformer blocks.

    Images may have any size of at least one patch: positions are interpolated, and pixels after the
    last whole patch are cut off, both as the publishers' code does.

    norm: of the states after the last block. CLIP's is for the class token alone:
    `tower.norm(tower(pixels)[:, 0])` is its `pooler_output`.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        kw: Any = dict(**config.dtypes, rngs=rngs)
        dim, patch, kind = config.embed_dim, config.patch_size, config.kind
        self.config = config

        def tokens(*shape: int) -> nnx.Param:
            init = jax.nn.initializers.normal(0.02)
            return nnx.Param(init(rngs.params(), shape, kw["param_dtype"]))

        self.project = Linear((patch, patch, 3), dim, use_bias=kind.patch_bias, **kw)
        self.class_token = tokens(dim) if kind.class_token else None
        self.registers = tokens(config.num_registers, dim) if config.num_registers else None
        self.positions = tokens(kind.class_token + config.grid_size**2, dim)
        self.pre_norm = _layer_norm(config, rngs) if kind.pre_norm else None
        self.blocks = equal_layers(
            config.scan_layers,
            config.num_layers,
            lambda *, rngs: VisionBlock(config, rngs=rngs),
            rngs=rngs,
        )
        self.norm = _layer_norm(config, rngs)

    @precise
    def __call__(self, pixels: Shaped[AnyArray, "..."]) -> Float[Array, "B S D"]:
        """The publisher's `last_hidden_state` of normalised pixels, floats [B, H, W, 3].

        The tokens are the class token and the registers, where the tower has them, then the patches
        row by row. Raises InputError for pixels of another shape or dtype.
        """
        x = self.hidden_state(pixels, self.config.num_layers)
        return self.norm(x) if self.config.kind.final_norm else x

    @precise
    def hidden_state(self, pixels: Shaped[AnyArray, "..."], layer: int) -> Float[Array, "B S D"]:
        """The state after so many blocks, before the final norm; `hidden_states[layer]` in
        transformers.

        layer: 0 = the embeddings, 1 = after the first block, up to `num_layers`. Negative ones
        count from the end: -1 = after the last block, -2 = after the last but one. Raises
        InputError for another.
        """
        total = self.config.num_layers
        if not -total - 1 <= layer <= total:
            raise InputError(f"layer {layer}: expected {-total - 1} to {total}")
        last = layer % (total + 1)

        def call(block: VisionBlock, x: jax.Array, index: Any) -> tuple[jax.Array, None]:
            if last < total and isinstance(index, Tracer):  # stacked: the others are skipped
                return jax.lax.cond(index < last, block, lambda x: x, x), None
            return block(x) if last == total or index < last else x, None

        indices = [np.int32(index) for index in range(total)]
        x = self._embed(pixels)
        return run_layers(call, self.blocks, x, indices, policy=self.config.remat)[0]

    def patches(
        self, pixels: Shaped[AnyArray, "..."], layer: int | None = None
    ) -> Float[Array, "B S D"]:
        """The tokens of the patches alone, row by row.

        layer: as in `hidden_state`, None = of the output of the tower. They differ in the final
        norm, which CLIP does not have.
        """
        x = self(pixels) if layer is None else self.hidden_state(pixels, layer)
        return x[:, self.config.num_prefix_tokens :]

    def _embed(self, pixels: Shaped[AnyArray, "..."]) -> Float[Array, "B S D"]:
        p = self.config.patch_size
        pixels = jnp.asarray(pixels)
        fits = pixels.ndim == 4 and pixels.shape[-1] == 3
        if not fits or not jnp.issubdtype(pixels.dtype, jnp.floating):
            found = f"{pixels.dtype}{list(pixels.shape)}"
            raise InputError(f"pixels are {found}; expected normalised floats [B, H, W, 3]")
        rows, columns = (side // p for side in pixels.shape[1:3])
        if not rows or not columns:
            raise InputError(
                f"image of {pixels.shape[1]} x {pixels.shape[2]} pixels; expected at least one "
                f"patch of {p} x {p}"
            )
        x = self.project(
            einops.rearrange(
                pixels[:, : rows * p, : columns * p],
                "B (h p) (w q) C -> B (h w) p q C",
                p=p,
                q=p,
            )
        )
        x = x + self._grid_positions(rows, columns).astype(x.dtype)[None]
        if self.class_token is not None:
            # Registers have no positions.
            first = [self.class_token[...][None] + self.positions[:1]]
            first += [] if self.registers is None else [self.registers[...]]
            prefix = jnp.concatenate(first).astype(x.dtype)
            prefix = jnp.broadcast_to(prefix[None], (len(x), *prefix.shape))
            x = jnp.concatenate([prefix, x], axis=1)
        return x if self.pre_norm is None else self.pre_norm(x)

    def _grid_positions(self, rows: int, columns: int) -> Float[Array, "S D"]:
        """The positions of the patches, interpolated for another grid than the learned one."""
        size, kind = self.config.grid_size, self.config.kind
        learned = self.positions[int(kind.class_token) :]
        if (rows, columns) == (size, size):
            return learned
        down, across = (
            bicubic_weights(new, size, antialias=kind.antialias) for new in (rows, columns)
        )
        grid = learned.astype(jnp.float32).reshape(size, size, -1)
        return jnp.einsum("hi,wj,ijd->hwd", down, across, grid).reshape(rows * columns, -1)


def _layer_norm(config: VisionConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits where states are large, as in trained towers.
    return nnx.LayerNorm(
        config.embed_dim,
        epsilon=config.norm_epsilon,
        use_fast_variance=False,
        **config.dtypes,
        rngs=rngs,
    )


def _scaled(x: Float[Array, "B S D"], scale: nnx.Param | None) -> Float[Array, "B S D"]:
    return x if scale is None else x * scale[...].astype(x.dtype)[None, None]
