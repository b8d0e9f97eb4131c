"""The settings that all language models share, and the checks of fields that several have."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from slam_jax.errors import require, require_count
from slam_jax.layers.remat import POLICIES

DTYPES = ("float32", "bfloat16", "float64")

# The largest value of each count, for every model that has a field of this name.
_MOST = {
    name: most
    for most, names in {
        512: "num_layers level_layers num_blocks num_cycles share_factor attention_period "
        "expert_period num_dense_layers num_shared_experts",
        4_096: "num_heads num_kv_heads num_experts state_dim conv_width expand",
        1 << 20: "vocab_size embed_dim context_length mlp_dim expert_dim kv_lora_rank q_lora_rank "
        "dt_rank head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim text_window",
    }.items()
    for name in names.split()
}
_MAY_BE_0 = ("num_dense_layers", "num_shared_experts")

# Sizes that layers take together, by their constructors' names.
HEADS = ("num_heads", "num_kv_heads", "head_dim")
EXPERTS = ("mlp_dim", "num_experts", "num_experts_per_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The settings of every language model.

    vocab_size: V. embed_dim: D. context_length: the most tokens of a prompt with its answer.
    norm_epsilon: of the norms. tie_embeddings: the head is the table of embeddings.
    remat: what a block keeps for its gradient, of `slam_jax.layers.remat.POLICIES`; None = all.
    dtype, param_dtype: of the computation and of the parameters.

    Raises ConfigError for a value that cannot be built. Fields of the same name mean the same in
    every model, and are checked here: counts by their name, rates and weights of losses by theirs.
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
        for field in dataclasses.fields(self):
            name = field.name
            value: Any = getattr(self, name)
            if name.endswith("balance_loss"):
                require(value >= 0, name, value, "0 (off) or more")
            if name == "dropout":
                require(0 <= value < 1, name, value, "a rate in [0, 1)")
            absent = value is None and field.default is None
            if name in _MOST and not absent:
                require_count(name, value, least=0 if name in _MAY_BE_0 else 1, most=_MOST[name])
        require(self.norm_epsilon > 0, "norm_epsilon", self.norm_epsilon, "a number above 0")
        policies = (None, *POLICIES)
        require(self.remat in policies, "remat", self.remat, f"one of {policies}")
        for name in ("dtype", "param_dtype"):
            dtype = getattr(self, name)
            require(dtype in DTYPES, name, dtype, f"one of {DTYPES}")
            known = dtype != "float64" or jax.dtypes.canonicalize_dtype(dtype) == dtype
            require(known, name, dtype, "another, or JAX_ENABLE_X64=1 in the environment")

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

    @property
    def dtypes(self) -> dict[str, Any]:
        """The two dtypes as keyword arguments of a layer."""
        return {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}

    def sizes(self, *fields: str) -> dict[str, Any]:
        """Fields as keyword arguments, of a layer or of its count in `layers.flops`."""
        return {field: getattr(self, field) for field in fields}
