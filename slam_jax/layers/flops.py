"""Floating-point operations of one forward pass through a layer, counted from its sizes.

A multiplication and the addition after it are two operations. Matrix products, convolutions and the
recurrence of Mamba are counted. Norms, activations, softmax, rotary positions and table look-ups
are not: they are less than a hundredth at the sizes that are compared. Attention is counted as it
is computed: every query with every key of its row, later ones too. Of the experts only those that a
token is sent to count.

The sizes have the names that they have in the layers' constructors. XLA's `cost_analysis()` is not
used: it counts the body of a loop once.
"""


def linear(num_tokens: int, in_features: int, out_features: int) -> int:
    return 2 * num_tokens * in_features * out_features


def scores(queries: int, keys: int, key_dim: int, value_dim: int) -> int:
    """Scores and the weighted sum of values; the widths are those of all heads together."""
    return linear(queries, keys, key_dim + value_dim)


def gated_mlp(num_tokens: int, embed_dim: int, mlp_dim: int) -> int:
    return 3 * linear(num_tokens, embed_dim, mlp_dim)


def attention(
    num_tokens: int,
    embed_dim: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    num_keys: int | None = None,
    own_keys: bool = True,
) -> int:
    """num_keys: tokens that are attended to, None = those of the queries. own_keys: whether the
    layer makes its keys and values; False = another layer counts them."""
    num_keys = num_tokens if num_keys is None else num_keys
    head_dim = head_dim or embed_dim // num_heads
    width, kv_width = num_heads * head_dim, (num_kv_heads or num_heads) * head_dim
    total = 2 * linear(num_tokens, embed_dim, width) + scores(num_tokens, num_keys, width, width)
    return total + (2 * linear(num_keys, embed_dim, kv_width) if own_keys else 0)


def latent_attention(
    num_tokens: int,
    embed_dim: int,
    num_heads: int,
    *,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
    q_lora_rank: int | None = None,
    own_keys: bool = True,
) -> int:
    """In the expanded form. own_keys: as in `attention`; with the latents that keys are made of."""
    key_dim, value_dim = num_heads * (qk_nope_head_dim + qk_rope_head_dim), num_heads * v_head_dim
    total = linear(num_tokens, q_lora_rank or embed_dim, key_dim)
    total += scores(num_tokens, num_tokens, key_dim, value_dim)
    total += linear(num_tokens, value_dim, embed_dim)
    if q_lora_rank is not None:
        total += linear(num_tokens, embed_dim, q_lora_rank)
    if own_keys:
        total += linear(num_tokens, embed_dim, kv_lora_rank + qk_rope_head_dim)
        total += linear(num_tokens, kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim))
    return total


def mixture_of_experts(
    num_tokens: int,
    embed_dim: int,
    mlp_dim: int,
    num_experts: int,
    num_experts_per_token: int,
    *,
    shared_dim: int = 0,
) -> int:
    """Router, the experts of each token, their weighted sum, and the shared MLP."""
    router = linear(num_tokens, embed_dim, num_experts)
    expert = gated_mlp(num_tokens, embed_dim, mlp_dim) + 2 * num_tokens * embed_dim
    shared = gated_mlp(num_tokens, embed_dim, shared_dim)
    return router + num_experts_per_token * expert + shared


def mamba(
    num_tokens: int,
    embed_dim: int,
    *,
    state_dim: int,
    conv_width: int,
    expand: int,
    dt_rank: int | None = None,
) -> int:
    width, rank = expand * embed_dim, dt_rank or -(-embed_dim // 16)
    maps = linear(num_tokens, embed_dim, 3 * width)
    maps += linear(num_tokens, width, 2 * rank + 2 * state_dim)
    convolution = 2 * num_tokens * width * conv_width
    # dt A, times the state, dt x B, their sum, times C, the sum over the state.
    return maps + convolution + 6 * num_tokens * width * state_dim
