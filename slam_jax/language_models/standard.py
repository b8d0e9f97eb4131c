"""The standard transformer: RMSNorm, rotary positions, grouped queries, SwiGLU.

Sources: Touvron et al. 2023, "LLaMA" (arXiv 2302.13971), section 2.2; grouped queries as in
Llama 2 (arXiv 2307.09288), section 2.2; windows as in Jiang et al. 2023, "Mistral 7B" (arXiv
2310.06825), section 2; biases as in Qwen2 (arXiv 2407.10671), section 2.2.
"""

import dataclasses
import functools
import itertools

from flax import nnx

from slam_jax.errors import require
from slam_jax.language_models.base import PreNormBlock, Transformer
from slam_jax.language_models.config import HEADS, TransformerConfig
from slam_jax.layers import flops
from slam_jax.layers.grouped_query_attention import GroupedQueryAttention
from slam_jax.layers.mlp import GatedMLP
from slam_jax.layers.stacked import repeat

QK_NORMS = (None, "before_rotation", "after_rotation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardConfig(TransformerConfig):
    """The switches in which published models differ. The other fields: see `LanguageModelConfig`.

    qkv_bias: of the maps to queries, keys and values, as in Qwen2. out_bias: of the output map.
      mlp_bias: of all maps of the MLP.
    qk_norm: RMS norms of queries and keys, one of QK_NORMS; "before_rotation" as in Qwen3,
      "after_rotation" as in Hunyuan.
    window: a token attends to itself and the window - 1 tokens before it, as in Mistral; None =
      all. window_layers: for each layer whether it has the window; None = all layers have.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None
    window: int | None = None
    window_layers: tuple[bool, ...] | None = None

    def __post_init__(self):
        super().__post_init__()
        require(self.qk_norm in QK_NORMS, "qk_norm", self.qk_norm, f"one of {QK_NORMS}")
        if self.window_layers is not None:
            object.__setattr__(self, "window_layers", tuple(self.window_layers))
            count, expected = len(self.window_layers), f"one for each of {self.num_layers} layers"
            require(count == self.num_layers, "the number of window_layers", count, expected)

    def window_of(self, layer: int) -> int | None:
        """The window of a layer."""
        has = self.window_layers is None or self.window_layers[layer]
        return self.window if has else None

    def body_flops(self, num_tokens: int) -> int:
        attention = flops.attention(num_tokens, self.embed_dim, **self.sizes(*HEADS))
        mlp = flops.gated_mlp(num_tokens, self.embed_dim, self.mlp_dim)
        return self.num_layers * (attention + mlp)


class Standard(Transformer):
    """A decoder-only transformer as most are built today."""

    def __init__(self, config: StandardConfig, *, rngs: nnx.Rngs):
        dim, heads = config.embed_dim, config.sizes(*HEADS, "rope", "qkv_bias", "out_bias")
        if config.qk_norm is not None:
            heads["qk_norm_epsilon"] = config.norm_epsilon
            heads["rotate_first"] = config.qk_norm == "after_rotation"

        def block(window: int | None, *, rngs: nnx.Rngs) -> PreNormBlock:
            kw = config.options(rngs)
            return PreNormBlock(
                config,
                attention=GroupedQueryAttention(dim, window=window, **heads, **kw),
                mlp=GatedMLP(dim, config.mlp_dim, use_bias=config.mlp_bias, **kw),
            )

        blocks = []
        for window, layers in itertools.groupby(map(config.window_of, range(config.num_layers))):
            make = functools.partial(block, window)
            blocks += repeat(config.scan_layers, len(list(layers)), make, rngs=rngs)
        super().__init__(config, blocks, rngs=rngs)
