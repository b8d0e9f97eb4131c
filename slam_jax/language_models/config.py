"""The settings that all language models share, and the checks of fields that several have."""

import dataclasses
from typing import Any

from slam_jax.errors import require
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
    dtype, param_dtype: of the computation and of the parameters.

    Raises ConfigError for a value that cannot be built.
    """

    vocab_size: int
    embed_dim: int
    context_length: int = 2_048
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = False
    remat: str | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        super().__post_init__()
        require(self.norm_epsilon > 0, "norm_epsilon", self.norm_epsilon, "a number above 0")

    def body_flops(self, num_tokens: int) -> int:
        """Floating-point operations of one row of so many tokens, without the head; see `flops`."""
        raise NotImplementedError(f"{type(self).__name__} does not count its operations")

    def check_heads(self) -> None:
        """Raises ConfigError for heads that do not divide the width, or not each other; with
        rotary positions (a field `rope`) also for a head of odd width."""
        heads, width = self._get("num_heads"), self._get("head_dim")
        expected = f"a divisor of num_heads={heads}"
        kv_heads = self._get("num_kv_heads") or heads
        require(heads % kv_heads == 0, "num_kv_heads", kv_heads, expected)
        if width is None:
            expected = f"a multiple of num_heads={heads}, or give head_dim"
            require(self.embed_dim % heads == 0, "embed_dim", self.embed_dim, expected)
        if self._get("rope") is not None:
            field = "embed_dim" if width is None else "head_dim"
            even = (width or self.embed_dim // heads) % 2 == 0
            expected = "such that a head's width is even, for the rotary positions"
            require(even, field, getattr(self, field), expected)

    def check_experts(self) -> None:
        """Raises ConfigError where there are fewer experts than a token takes, or for a capacity
        that no expert can have."""
        most, k = self._get("num_experts"), self._get("num_experts_per_token")
        require(1 <= k <= most, "num_experts_per_token", k, f"1 to num_experts={most}")
        factor = self._get("capacity_factor")
        within = factor is None or 0 < factor <= most
        require(within, "capacity_factor", factor, f"None, or above 0 and at most {most}")

    def _get(self, field: str) -> Any:
        return getattr(self, field, None)
