"""How many floating-point operations a forward pass takes, counted by architecture.

A multiplication and the addition after it are two. Counted are matrix products, and of Mamba its
recurrence; not norms, activations, softmax, rotary turns and tables, which are below a hundredth of
it at the sizes that are compared. Attention is counted as it is computed: every query with every
key of its row, those ahead of it among them. Of experts only those that a token goes to.

Each architecture counts its own layers (`LanguageModelConfig.body_flops`), from the parts below.
`cost_analysis()` of XLA is not asked: it counts a loop's body once.
"""

from typing import Any


def forward_flops(config: Any, num_tokens: int) -> int:
    """Of one row of `num_tokens` tokens, logits of all of them among it."""
    return config.body_flops(num_tokens) + linear(num_tokens, config.embed_dim, config.vocab_size)


def training_flops(config: Any, num_tokens: int) -> int:
    """Of a forward and a backward pass over one row: every product is taken three times."""
    return 3 * forward_flops(config, num_tokens)


def linear(num_tokens: int, inputs: int, outputs: int) -> int:
    return 2 * num_tokens * inputs * outputs


def scores(queries: int, keys: int, num_heads: int, key_dim: int, value_dim: int) -> int:
    return 2 * queries * keys * num_heads * (key_dim + value_dim)


def gated_mlp(num_tokens: int, embed_dim: int, mlp_dim: int) -> int:
    return 3 * linear(num_tokens, embed_dim, mlp_dim)


def attention(num_tokens: int, config: Any, own_keys: bool = True) -> int:
    """With queries and output, and keys and values where a layer makes them."""
    num_heads = config.num_heads
    num_kv_heads = getattr(config, "num_kv_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.embed_dim // num_heads
    width = 2 * num_heads + (2 * num_kv_heads if own_keys else 0)
    maps = linear(num_tokens, config.embed_dim, width * head_dim)
    return maps + scores(num_tokens, num_tokens, num_heads, head_dim, head_dim)


def latent_queries(num_tokens: int, config: Any) -> int:
    """With the scores and the output."""
    num_heads, rank = config.num_heads, getattr(config, "q_lora_rank", None)
    key_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    down = 0 if rank is None else linear(num_tokens, config.embed_dim, rank)
    up = linear(num_tokens, rank or config.embed_dim, num_heads * key_dim)
    out = linear(num_tokens, num_heads * config.v_head_dim, config.embed_dim)
    return down + up + scores(num_tokens, num_tokens, num_heads, key_dim, config.v_head_dim) + out


def latents(num_tokens: int, config: Any) -> int:
    """Down, and up to keys and values."""
    rank = config.kv_lora_rank
    down = linear(num_tokens, config.embed_dim, rank + config.qk_rope_head_dim)
    heads = config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
    return down + linear(num_tokens, rank, heads)


def experts(num_tokens: int, config: Any, mlp_dim: int, shared_dim: int = 0) -> int:
    router = linear(num_tokens, config.embed_dim, config.num_experts)
    routed = gated_mlp(num_tokens, config.embed_dim, mlp_dim) + 2 * num_tokens * config.embed_dim
    shared = gated_mlp(num_tokens, config.embed_dim, shared_dim)
    return router + config.num_experts_per_token * routed + shared
