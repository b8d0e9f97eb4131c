"""The settings that all language models share, and the checks of fields that several have."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from slam_jax.errors import require
from slam_jax.layers.linear import Initializer
from slam_jax.layers.rotary import Rope
from slam_jax.model_config import ModelConfig

# Sizes that layers take together, by their constructors' names.
HEADS = ("num_heads", "num_kv_heads", "head_dim")
EXPERTS = ("mlp_dim", "num_experts", "num_experts_per_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(ModelConfig):
    """The settings of every language model.

    vocab_size: V. embed_dim: D. context_length: the most tokens of a prompt with its answer.
    norm_epsilon: of the norms. tie_embeddings: the head is the table of embeddings.
    remat: what a block keeps for its gradient, of `slam_jax.layers.remat.POLICIES`; None = all.
    scan_layers: whether the parameters of equal blocks are stacked, and the blocks scanned; None =
      on GPUs and TPUs, from five equal blocks on. It changes no result.
    dtype, param_dtype: of the computation and of the parameters.
    matmul_precision: of products of float32 matrices on GPUs and TPUs: "float32"; "tensorfloat32",
      which is faster and keeps 10 bits of each factor; None = as JAX is configured.

    Fields of other models, where several have them:
    mlp_dim: F. num_layers. num_heads: N. num_kv_heads: K, None = N. head_dim: H, None = D / N.
    rope: the positions. init_std: of all maps and the embeddings.
    num_experts: E. num_experts_per_token: k. balance_loss: weight of the load-balancing loss.
    capacity_factor: in training, an expert takes at most this many times its share of the tokens
      and drops those with the least weight; None = drops none.

    Raises ConfigError for a value that cannot be built.
    """

    vocab_size: int
    embed_dim: int
    context_length: int = 2_048
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = False
    remat: str | None = None
    scan_layers: bool | None = None
    dtype: str | None = "float32"
    param_dtype: str = "float32"
    matmul_precision: str | None = "float32"

    def __post_init__(self):
        super().__post_init__()
        require(self.norm_epsilon > 0, "norm_epsilon", self.norm_epsilon, "a number above 0")
        fields = vars(self)
        if "num_heads" in fields and "kv_lora_rank" not in fields:
            self._check_heads(**fields)
        width = fields.get("qk_rope_head_dim", 2)
        require(width % 2 == 0, "qk_rope_head_dim", width, "an even number above 0")
        if "num_experts" in fields:
            self._check_experts(**fields)

    def _check_heads(
        self, num_heads, num_kv_heads=None, head_dim=None, rope=None, **others
    ) -> None:
        """Heads divide the width and each other; with rotary positions a head's width is even."""
        kv_heads, expected = num_kv_heads or num_heads, f"a divisor of num_heads={num_heads}"
        require(num_heads % kv_heads == 0, "num_kv_heads", kv_heads, expected)
        field, width = ("embed_dim", self.embed_dim) if head_dim is None else ("head_dim", head_dim)
        if head_dim is None:
            expected = f"a multiple of num_heads={num_heads}, or give head_dim"
            require(width % num_heads == 0, field, width, expected)
        even = rope is None or (head_dim or self.embed_dim // num_heads) % 2 == 0
        expected = "such that a head's width is even, for the rotary positions"
        require(even, field, width, expected)
        if rope is not None:
            rope.frequencies(head_dim or self.embed_dim // num_heads)  # checks its factors

    def _check_experts(
        self, num_experts, num_experts_per_token, capacity_factor=None, **others
    ) -> None:
        k, expected = num_experts_per_token, f"1 to num_experts={num_experts}"
        require(1 <= k <= num_experts, "num_experts_per_token", k, expected)
        expected = f"None, or above 0 and at most {num_experts}"
        within = capacity_factor is None or 0 < capacity_factor <= num_experts
        require(within, "capacity_factor", capacity_factor, expected)

    def body_flops(self, num_tokens: int) -> int:
        """Floating-point operations of one row of so many tokens, without the head; see
        `layers.flops`."""
        raise NotImplementedError(f"{type(self).__name__} does not count its operations")

    @property
    def init(self) -> Initializer:
        """How maps and embeddings start: normal, with `init_std` where that is a field."""
        return jax.nn.initializers.normal(getattr(self, "init_std", 0.02))

    def options(self, rngs: nnx.Rngs) -> dict[str, Any]:
        """The keyword arguments that every layer takes."""
        return dict(**self.dtypes, kernel_init=self.init, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(LanguageModelConfig):
    """The settings of a stack of layers with grouped queries and rotary positions."""

    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope: Rope = Rope()
    init_std: float = 0.02
