"""The names of weights in published files, and which parameters they are: a dict a model.

Each function takes a configuration and tells for every published key the `Tensor` behind it. With
`fused`, experts are one tensor for all of them, as transformers 5 has them in memory; files on the
hub have one a expert.
"""

from collections.abc import Callable
from typing import Any

from slam_jax.interop.tensors import (
    Piece,
    Tensor,
    expert,
    heads_in,
    heads_out,
    linear,
    matrix,
    rows,
    vector,
)

Layout = dict[str, Tensor]


def llama(config: Any, fused: bool = False) -> Layout:
    layout = _top(config, "model.norm")
    for i in range(config.num_layers):
        key, path = f"model.layers.{i}.", ("blocks", i)
        layout |= _norms(key, path, "input_layernorm", "post_attention_layernorm")
        layout |= _attention(f"{key}self_attn.", (*path, "attention"))
        layout |= _gated(f"{key}mlp.", (*path, "mlp"))
    return layout


def mixtral(config: Any, fused: bool = False) -> Layout:
    layout = _top(config, "model.norm")
    for i in range(config.num_layers):
        key, path = f"model.layers.{i}.", ("blocks", i)
        layout |= _norms(key, path, "input_layernorm", "post_attention_layernorm")
        layout |= _attention(f"{key}self_attn.", (*path, "attention"))
        mlp = f"{key}{'mlp' if fused else 'block_sparse_moe'}."
        layout[f"{mlp}gate.weight"] = linear(*path, "mlp", "router", "scores")
        names = ("w1", "w3", "w2")
        layout |= _experts(f"{mlp}experts.", (*path, "mlp", "experts"), config, fused, names)
    return layout


def jamba(config: Any, fused: bool = False) -> Layout:
    layout = _top(config, "model.final_layernorm")
    for i in range(config.num_layers):
        key, path = f"model.layers.{i}.", ("blocks", i)
        layout[f"{key}input_layernorm.weight"] = vector(*path, "mixer_norm", "scale")
        layout[f"{key}pre_ff_layernorm.weight"] = vector(*path, "mlp_norm", "scale")
        if config.has_attention(i):
            layout |= _attention(f"{key}self_attn.", (*path, "mixer"))
        else:
            layout |= _mamba(f"{key}mamba.", (*path, "mixer"), config)
        if config.has_experts(i):
            mlp, ours = f"{key}feed_forward.", (*path, "mlp")
            layout[f"{mlp}router.weight"] = linear(*ours, "router", "scores")
            layout |= _experts(f"{mlp}experts.", (*ours, "experts"), config, fused)
        else:
            layout |= _gated(f"{key}feed_forward.", (*path, "mlp"))
    return layout


def deepseek_v2(config: Any, fused: bool = False) -> Layout:
    layout = _top(config, "model.norm")
    for i in range(config.num_layers):
        key, path = f"model.layers.{i}.", ("blocks", i)
        layout |= _norms(key, path, "input_layernorm", "post_attention_layernorm")
        layout |= _latent_attention(f"{key}self_attn.", (*path, "attention"), config)
        mlp, ours = f"{key}mlp.", (*path, "mlp")
        if i < config.num_dense_layers:
            layout |= _gated(mlp, ours)
            continue
        layout[f"{mlp}gate.weight"] = linear(*ours, "router", "scores")
        layout |= _experts(f"{mlp}experts.", (*ours, "experts"), config, fused)
        if config.num_shared_experts:
            layout |= _gated(f"{mlp}shared_experts.", (*ours, "shared"))
    return layout


def hunyuan_large(config: Any, fused: bool = False) -> Layout:
    layout = _top(config, "model.norm")
    for i in range(config.num_layers):
        block, inner = divmod(i, config.share_factor)
        key, path = f"model.layers.{i}.", ("blocks", block, "layers", inner)
        layout |= _norms(key, path, "input_layernorm", "post_attention_layernorm")
        attention = (*path, "attention")
        layout[f"{key}self_attn.q_proj.weight"] = heads_in(*attention, "query")
        layout[f"{key}self_attn.o_proj.weight"] = heads_out(*attention, "out")
        if inner == 0:
            layout[f"{key}self_attn.k_proj.weight"] = heads_in(*path, "key_values", "key")
            layout[f"{key}self_attn.v_proj.weight"] = heads_in(*path, "key_values", "value")
        if config.qk_norm:
            layout |= _qk_norms(f"{key}self_attn.", attention)
        layout |= _hunyuan_experts(f"{key}mlp.", (*path, "mlp"), config, fused)
    return layout


def hunyuan_v1_moe(config: Any, fused: bool = False) -> Layout:
    layout = _top(config, "model.norm")
    for i in range(config.num_layers):
        key, path = f"model.layers.{i}.", ("blocks", i)
        layout |= _norms(key, path, "input_layernorm", "post_attention_layernorm")
        layout |= _attention(f"{key}self_attn.", (*path, "attention"))
        layout |= _qk_norms(f"{key}self_attn.", (*path, "attention"))
        layout |= _hunyuan_experts(f"{key}mlp.", (*path, "mlp"), config, fused)
    return layout


LAYOUTS: dict[str, Callable[..., Layout]] = {
    "llama": llama,
    "mixtral": mixtral,
    "jamba": jamba,
    "deepseek_v2": deepseek_v2,
    "hunyuan": hunyuan_large,
    "hunyuan_v1_moe": hunyuan_v1_moe,
}


def _top(config: Any, norm: str) -> Layout:
    layout = {
        "model.embed_tokens.weight": matrix("embedding", "embedding"),
        f"{norm}.weight": vector("norm", "scale"),
    }
    if not config.tie_embeddings:
        layout["lm_head.weight"] = linear("head")
    return layout


def _norms(key: str, path: tuple, before_attention: str, before_mlp: str) -> Layout:
    return {
        f"{key}{before_attention}.weight": vector(*path, "attention_norm", "scale"),
        f"{key}{before_mlp}.weight": vector(*path, "mlp_norm", "scale"),
    }


def _attention(key: str, path: tuple) -> Layout:
    return {
        f"{key}q_proj.weight": heads_in(*path, "query"),
        f"{key}k_proj.weight": heads_in(*path, "key"),
        f"{key}v_proj.weight": heads_in(*path, "value"),
        f"{key}o_proj.weight": heads_out(*path, "out"),
    }


def _qk_norms(key: str, path: tuple) -> Layout:
    return {
        f"{key}query_layernorm.weight": vector(*path, "q_norm", "scale"),
        f"{key}key_layernorm.weight": vector(*path, "k_norm", "scale"),
    }


def _latent_attention(key: str, path: tuple, config: Any) -> Layout:
    def of_heads(first: str, second: str) -> Tensor:
        """In each head, the rows of the first map and then those of the second."""
        pieces = [Piece((*path, name, "kernel"), "i n h -> n h i") for name in (first, second)]
        return Tensor(pieces, "h", "n h i -> (n h) i")

    layout = {
        f"{key}kv_a_proj_with_mqa.weight": rows((*path, "kv_down"), (*path, "k_rope")),
        f"{key}kv_a_layernorm.weight": vector(*path, "kv_norm", "scale"),
        f"{key}kv_b_proj.weight": of_heads("k_up", "v_up"),
        f"{key}o_proj.weight": heads_out(*path, "out"),
    }
    if config.q_lora_rank is None:
        return {**layout, f"{key}q_proj.weight": of_heads("q_nope", "q_rope")}
    return {
        **layout,
        f"{key}q_a_proj.weight": linear(*path, "q_down"),
        f"{key}q_a_layernorm.weight": vector(*path, "q_norm", "scale"),
        f"{key}q_b_proj.weight": of_heads("q_nope", "q_rope"),
    }


def _mamba(key: str, path: tuple, config: Any) -> Layout:
    layout = {
        f"{key}in_proj.weight": rows((*path, "value"), (*path, "gate")),
        f"{key}conv1d.weight": Tensor(
            [Piece((*path, "conv_filter"), "w i -> i w")], merge="i w -> i 1 w"
        ),
        f"{key}x_proj.weight": rows((*path, "dt_down"), (*path, "b"), (*path, "c")),
        f"{key}dt_layernorm.weight": vector(*path, "dt_norm", "scale"),
        f"{key}b_layernorm.weight": vector(*path, "b_norm", "scale"),
        f"{key}c_layernorm.weight": vector(*path, "c_norm", "scale"),
        f"{key}dt_proj.weight": linear(*path, "dt_up"),
        f"{key}dt_proj.bias": vector(*path, "dt_up", "bias"),
        f"{key}A_log": matrix(*path, "a_log"),
        f"{key}D": vector(*path, "skip"),
        f"{key}out_proj.weight": linear(*path, "out"),
    }
    if config.conv_bias:
        layout[f"{key}conv1d.bias"] = vector(*path, "conv_bias")
    if config.proj_bias:
        biases = [Piece((*path, name, "bias"), "o -> o") for name in ("value", "gate")]
        layout[f"{key}in_proj.bias"] = Tensor(biases, "o")
        layout[f"{key}out_proj.bias"] = vector(*path, "out", "bias")
    return layout


def _gated(key: str, path: tuple) -> Layout:
    return {f"{key}{name}_proj.weight": linear(*path, name) for name in ("gate", "up", "down")}


def _hunyuan_experts(key: str, path: tuple, config: Any, fused: bool) -> Layout:
    layout = {f"{key}gate.wg.weight": linear(*path, "router", "scores")}
    layout |= _experts(f"{key}experts.", (*path, "experts"), config, fused)
    if getattr(config, "num_shared_experts", 1):
        layout |= _gated(f"{key}shared_mlp.", (*path, "shared"))
    return layout


def _experts(
    key: str,
    path: tuple,
    config: Any,
    fused: bool,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Layout:
    """names: of gate, up and down, where every expert has its own."""
    if fused:
        both = [Piece((*path, name, "kernel"), "e i o -> e o i") for name in ("gate", "up")]
        down = [Piece((*path, "down", "kernel"), "e i o -> e o i")]
        return {f"{key}gate_up_proj": Tensor(both, "o"), f"{key}down_proj": Tensor(down)}
    return {
        f"{key}{e}.{name}.weight": expert(e, *path, ours)
        for e in range(config.num_experts)
        for name, ours in zip(names, ("gate", "up", "down"), strict=True)
    }
