"""The settings of a vision tower, and how the published kinds differ."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

from slam_jax.errors import require, require_count
from slam_jax.model_config import ModelConfig


class Kind(NamedTuple):
    """The switches that no publisher has a field for.

    class_token: a learned token before the patches. patch_bias: of the patch projection. pre_norm:
    a norm before the first block. final_norm: whether `norm` is part of the forward pass.
    layer_scale: a learned scale of what each attention and MLP adds. antialias: how positions are
    interpolated for smaller grids.
    """

    class_token: bool = True
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    layer_scale: bool = False
    antialias: bool = False


KINDS: Mapping[str, Kind] = {
    "vit": Kind(),
    "dinov2": Kind(layer_scale=True),
    "dinov2_with_registers": Kind(layer_scale=True, antialias=True),
    "clip_vision_model": Kind(patch_bias=False, pre_norm=True, final_norm=False),
    "siglip_vision_model": Kind(class_token=False),
}
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(ModelConfig):
    """The settings of a vision tower.

    model_type: of `KINDS`. image_size: pixels along a side of the square image that the positions
    were learned for. patch_size: pixels along a side of a patch. embed_dim: D. mlp_dim: F.
    activation: of `ACTIVATIONS`. qkv_bias: whether queries, keys and values have biases. swiglu:
    gated MLPs, of two thirds of F. num_registers: tokens after the class token that hold nothing of
    one patch. remat, scan_layers, dtype, param_dtype, matmul_precision: as in
    `LanguageModelConfig`.

    Raises ConfigError for a value that cannot be built.
    """

    model_type: str
    image_size: int
    patch_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    activation: str = "gelu"
    norm_epsilon: float = 1e-6
    qkv_bias: bool = True
    swiglu: bool = False
    num_registers: int = 0
    remat: str | None = None
    scan_layers: bool | None = None
    dtype: str | None = "float32"
    param_dtype: str = "float32"
    matmul_precision: str | None = "float32"

    def __post_init__(self):
        super().__post_init__()
        for field, known in (("model_type", KINDS), ("activation", ACTIVATIONS)):
            value = getattr(self, field)
            require(value in known, field, value, f"one of {', '.join(known)}")
        require_count("image_size", self.image_size, most=1 << 14)
        require_count("patch_size", self.patch_size, most=self.image_size)
        require_count("num_registers", self.num_registers, least=0, most=1_024)
        require(self.norm_epsilon > 0, "norm_epsilon", self.norm_epsilon, "a number above 0")
        divided = self.embed_dim % self.num_heads == 0
        require(divided, "embed_dim", self.embed_dim, f"a multiple of num_heads={self.num_heads}")
        has_class = self.kind.class_token or not self.num_registers
        require(has_class, "num_registers", self.num_registers, "0 without a class token")

    @property
    def kind(self) -> Kind:
        return KINDS[self.model_type]

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """The hidden units of an MLP. Gated ones have two thirds, rounded up to a multiple of 8."""
        return (int(self.mlp_dim * 2 / 3) + 7) // 8 * 8 if self.swiglu else self.mlp_dim

    @property
    def grid_size(self) -> int:
        """Patches along a side of an image of `image_size`."""
        return self.image_size // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """The tokens before those of the patches: the class token and the registers."""
        return self.kind.class_token + self.num_registers
