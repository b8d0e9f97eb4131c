"""How many floating-point operations a forward pass takes, counted by architecture.

A multiplication and the addition after it are two. Counted are matrix products, and of Mamba its
recurrence; not norms, activations, softmax, rotary turns and tables, which are below a hundredth of
it at the sizes that are compared. Attention is counted as it is computed: every query with every
key of its row, those ahead of it among them. Of experts only those that a token goes to.

`cost_analysis()` of XLA is not asked: it counts a loop's body once.
"""

import functools
from typing import Any

from slam_jax.language_models import (
    DeepseekV2Config,
    HunyuanLargeConfig,
    HunyuanV1MoEConfig,
    JambaConfig,
    MoEConfig,
    SlamV3TextConfig,
    SlamV4ChampionConfig,
    SlamV4Config,
    SlamV5Config,
    SlamV6Config,
    StandardConfig,
)
from slam_jax.slam_v3.flops import decode_flops, encode_flops


def forward_flops(config: Any, num_tokens: int) -> int:
    """Of one row of `num_tokens` tokens, logits of all of them among it."""
    head = 2 * config.embed_dim * config.vocab_size * num_tokens
    return _body(config, num_tokens) + head


def training_flops(config: Any, num_tokens: int) -> int:
    """Of a forward and a backward pass over one row: every product is taken three times."""
    return 3 * forward_flops(config, num_tokens)


@functools.singledispatch
def _body(config: Any, num_tokens: int) -> int:
    """All but the head."""
    raise TypeError(f"no count of FLOPs for a {type(config).__name__}")


def _linear(num_tokens: int, inputs: int, outputs: int) -> int:
    return 2 * num_tokens * inputs * outputs


def _scores(queries: int, keys: int, num_heads: int, key_dim: int, value_dim: int) -> int:
    return 2 * queries * keys * num_heads * (key_dim + value_dim)


def _gated(num_tokens: int, embed_dim: int, mlp_dim: int) -> int:
    return 3 * _linear(num_tokens, embed_dim, mlp_dim)


def _attention(num_tokens: int, config: Any, own_keys: bool = True) -> int:
    """With queries and output, and keys and values where a layer makes them."""
    num_heads = config.num_heads
    num_kv_heads = getattr(config, "num_kv_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.embed_dim // num_heads
    width = 2 * num_heads + (2 * num_kv_heads if own_keys else 0)
    maps = _linear(num_tokens, config.embed_dim, width * head_dim)
    return maps + _scores(num_tokens, num_tokens, num_heads, head_dim, head_dim)


def _latent_queries(num_tokens: int, config: Any) -> int:
    """With the scores and the output."""
    num_heads, rank = config.num_heads, getattr(config, "q_lora_rank", None)
    key_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    down = 0 if rank is None else _linear(num_tokens, config.embed_dim, rank)
    up = _linear(num_tokens, rank or config.embed_dim, num_heads * key_dim)
    scores = _scores(num_tokens, num_tokens, num_heads, key_dim, config.v_head_dim)
    out = _linear(num_tokens, num_heads * config.v_head_dim, config.embed_dim)
    return down + up + scores + out


def _latents(num_tokens: int, config: Any) -> int:
    """Down, and up to keys and values."""
    rank = config.kv_lora_rank
    down = _linear(num_tokens, config.embed_dim, rank + config.qk_rope_head_dim)
    heads = config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
    return down + _linear(num_tokens, rank, heads)


def _experts(num_tokens: int, config: Any, mlp_dim: int, shared_dim: int = 0) -> int:
    router = _linear(num_tokens, config.embed_dim, config.num_experts)
    routed = _gated(num_tokens, config.embed_dim, mlp_dim) + 2 * num_tokens * config.embed_dim
    shared = _gated(num_tokens, config.embed_dim, shared_dim)
    return router + config.num_experts_per_token * routed + shared


@_body.register
def _(config: StandardConfig, num_tokens: int) -> int:
    mlp = _gated(num_tokens, config.embed_dim, config.mlp_dim)
    return config.num_layers * (_attention(num_tokens, config) + mlp)


@_body.register
def _(config: MoEConfig, num_tokens: int) -> int:
    mlp = _experts(num_tokens, config, config.mlp_dim)
    return config.num_layers * (_attention(num_tokens, config) + mlp)


@_body.register
def _(config: HunyuanV1MoEConfig, num_tokens: int) -> int:
    mlp = _experts(num_tokens, config, config.mlp_dim, config.mlp_dim)
    return config.num_layers * (_attention(num_tokens, config) + mlp)


@_body.register
def _(config: HunyuanLargeConfig, num_tokens: int) -> int:
    shared_dim = config.num_shared_experts * config.mlp_dim
    mlp = _experts(num_tokens, config, config.mlp_dim, shared_dim)
    layers = (layer % config.share_factor == 0 for layer in range(config.num_layers))
    return sum(_attention(num_tokens, config, own_keys=owns) + mlp for owns in layers)


@_body.register
def _(config: DeepseekV2Config, num_tokens: int) -> int:
    dense = _gated(num_tokens, config.embed_dim, config.mlp_dim)
    shared_dim = config.num_shared_experts * config.expert_dim
    experts = _experts(num_tokens, config, config.expert_dim, shared_dim)
    attention = _latents(num_tokens, config) + _latent_queries(num_tokens, config)
    num_dense = min(config.num_dense_layers, config.num_layers)
    mlps = num_dense * dense + (config.num_layers - num_dense) * experts
    return config.num_layers * attention + mlps


@_body.register
def _(config: JambaConfig, num_tokens: int) -> int:
    total = 0
    for layer in range(config.num_layers):
        if config.has_attention(layer):
            total += _attention(num_tokens, config)
        else:
            total += _mamba(num_tokens, config)
        if config.has_experts(layer):
            total += _experts(num_tokens, config, config.mlp_dim)
        else:
            total += _gated(num_tokens, config.embed_dim, config.mlp_dim)
    return total


def _mamba(num_tokens: int, config: JambaConfig) -> int:
    width, rank = config.expand * config.embed_dim, config.dt_rank or -(-config.embed_dim // 16)
    maps = _linear(num_tokens, config.embed_dim, 3 * width)
    maps += _linear(num_tokens, width, 2 * rank + 2 * config.state_dim)
    convolution = 2 * num_tokens * width * config.conv_width
    # dt A, times the state, dt x B, their sum, times C, the sum over the state.
    return maps + convolution + 6 * num_tokens * width * config.state_dim


@_body.register
def _(config: SlamV4Config, num_tokens: int) -> int:
    dim = config.embed_dim
    mlp = 2 * _linear(num_tokens, dim, config.mlp_dim)
    layer = _attention(num_tokens, config) + mlp
    block = _attention(num_tokens, config, own_keys=False) + mlp
    keys = 2 * _linear(num_tokens, dim, dim)
    return 2 * config.level_layers * layer + keys + config.num_blocks * block


@_body.register
def _(config: SlamV4ChampionConfig, num_tokens: int) -> int:
    dim = config.embed_dim
    rest = _linear(num_tokens, dim, 3 * dim) + _gated(num_tokens, dim, config.mlp_dim)
    layer = _attention(num_tokens, config) + rest
    block = _attention(num_tokens, config, own_keys=False) + rest
    keys = 2 * _linear(num_tokens, dim, dim)
    blocks = config.num_cycles * config.num_blocks * block
    return 2 * config.level_layers * layer + keys + blocks


@_body.register
def _(config: SlamV5Config, num_tokens: int) -> int:
    mlp = _gated(num_tokens, config.embed_dim, config.mlp_dim)
    latents, queries = _latents(num_tokens, config), _latent_queries(num_tokens, config)
    layers = 2 * config.level_layers * (latents + queries + mlp)
    return layers + latents + config.num_blocks * (queries + mlp)


@_body.register
def _(config: SlamV6Config, num_tokens: int) -> int:
    dim, mlp_dim = config.embed_dim, config.mlp_dim

    def layer(mlp_dim: int) -> int:
        """Attention, its gate, the GLU, and the map of both to one."""
        gate_and_out = _linear(num_tokens, dim, 3 * dim)
        return _attention(num_tokens, config) + gate_and_out + _gated(num_tokens, dim, mlp_dim)

    specialists = layer(mlp_dim // 2) + layer(2 * mlp_dim)
    specialists += _linear(num_tokens, dim, 2 * dim) + _gated(num_tokens, dim, mlp_dim)
    blocks = 4 * (_linear(num_tokens, dim, 3 * dim) + layer(mlp_dim)) + specialists
    fusion = _linear(num_tokens, dim, 4) + _gated(num_tokens, dim, dim)
    return 2 * config.level_layers * layer(mlp_dim) + blocks + fusion


@_body.register
def _(config: SlamV3TextConfig, num_tokens: int) -> int:
    v3, window = config.slam_v3, config.text_window
    # The last window is read by nobody; one that is not full is taken as if it were.
    count = -(-num_tokens // window)
    decoder = decode_flops(v3, prompts=1, length=window, memory=window)
    decoder -= 2 * window * config.embed_dim * config.vocab_size  # the head is counted elsewhere
    return (count - 1) * encode_flops(v3, text=window) + count * decoder
