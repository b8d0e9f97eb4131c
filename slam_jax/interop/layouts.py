"""The names of weights in published files and the parameters behind them, for each model type.

Each function returns, for a configuration, the `Tensor` behind every published key. Experts are one
tensor each, as in the files on the hub; with `fused` all experts of a layer are one tensor, as
transformers 5 has them in memory.
"""

from collections.abc import Callable, Iterator
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
    layout = _top(config)
    for _, key, path in _layers(config):
        layout |= _norms(key, path) | _attention(f"{key}self_attn.", (*path, "attention"))
        layout |= _gated(f"{key}mlp.", (*path, "mlp"))
    return layout


def mixtral(config: Any, fused: bool = False) -> Layout:
    layout = _top(config)
    for _, key, path in _layers(config):
        layout |= _norms(key, path) | _attention(f"{key}self_attn.", (*path, "attention"))
        mlp = f"{key}{'mlp' if fused else 'block_sparse_moe'}."
        names = ("w1", "w3", "w2")
        layout |= _experts(mlp, (*path, "mlp"), config, fused, names=names)
    return layout


def jamba(config: Any, fused: bool = False) -> Layout:
    layout = _top(config, "model.final_layernorm")
    for i, key, path in _layers(config):
        layout |= _norms(key, path, ("input_layernorm", "mixer"), ("pre_ff_layernorm", "mlp"))
        if config.has_attention(i):
            layout |= _attention(f"{key}self_attn.", (*path, "mixer"))
        else:
            layout |= _mamba(f"{key}mamba.", (*path, "mixer"), config)
        mlp, ours = f"{key}feed_forward.", (*path, "mlp")
        if config.has_experts(i):
            layout |= _experts(mlp, ours, config, fused, router="router")
        else:
            layout |= _gated(mlp, ours)
    return layout


def deepseek_v2(config: Any, fused: bool = False) -> Layout:
    layout = _top(config)
    for i, key, path in _layers(config):
        layout |= _norms(key, path)
        layout |= _latent_attention(f"{key}self_attn.", (*path, "attention"), config)
        mlp, ours = f"{key}mlp.", (*path, "mlp")
        if i < config.num_dense_layers:
            layout |= _gated(mlp, ours)
            continue
        layout |= _experts(mlp, ours, config, fused)
        if config.num_shared_experts:
            layout |= _gated(f"{mlp}shared_experts.", (*ours, "shared"))
    return layout


def hunyuan_large(config: Any, fused: bool = False) -> Layout:
    layout = _top(config)
    for i, key, _ in _layers(config):
        block, inner = divmod(i, config.share_factor)
        path = ("blocks", block, "layers", inner)
        attention = (*path, "attention")
        layout |= _norms(key, path)
        layout[f"{key}self_attn.q_proj.weight"] = heads_in(*attention, "query")
        layout[f"{key}self_attn.o_proj.weight"] = heads_out(*attention, "out")
        if inner == 0:
            layout[f"{key}self_attn.k_proj.weight"] = heads_in(*path, "key_values", "key")
            layout[f"{key}self_attn.v_proj.weight"] = heads_in(*path, "key_values", "value")
        if config.qk_norm:
            layout |= _qk_norms(f"{key}self_attn.", attention)
        layout |= _experts(f"{key}mlp.", (*path, "mlp"), config, fused, router="gate.wg")
        if config.num_shared_experts:
            layout |= _gated(f"{key}mlp.shared_mlp.", (*path, "mlp", "shared"))
    return layout


def hunyuan_v1_moe(config: Any, fused: bool = False) -> Layout:
    layout = _top(config)
    for _, key, path in _layers(config):
        layout |= _norms(key, path) | _attention(f"{key}self_attn.", (*path, "attention"))
        layout |= _qk_norms(f"{key}self_attn.", (*path, "attention"))
        layout |= _experts(f"{key}mlp.", (*path, "mlp"), config, fused, router="gate.wg")
        layout |= _gated(f"{key}mlp.shared_mlp.", (*path, "mlp", "shared"))
    return layout


LAYOUTS: dict[str, Callable[..., Layout]] = {
    "llama": llama,
    "mixtral": mixtral,
    "jamba": jamba,
    "deepseek_v2": deepseek_v2,
    "hunyuan": hunyuan_large,
    "hunyuan_v1_moe": hunyuan_v1_moe,
}


def _layers(config: Any) -> Iterator[tuple[int, str, tuple]]:
    """For each layer: its number, the beginning of its published keys, the path of its block."""
    for i in range(config.num_layers):
        yield i, f"model.layers.{i}.", ("blocks", i)


def _top(config: Any, norm: str = "model.norm") -> Layout:
    layout = {
        "model.embed_tokens.weight": matrix("embedding", "embedding"),
        f"{norm}.weight": vector("norm", "scale"),
    }
    if not config.tie_embeddings:
        layout["lm_head.weight"] = linear("head")
    return layout


def _norms(
    key: str,
    path: tuple,
    *names: tuple[str, str],
) -> Layout:
    """names: the published name of each norm and ours."""
    names = names or (("input_layernorm", "attention"), ("post_attention_layernorm", "mlp"))
    return {
        f"{key}{published}.weight": vector(*path, f"{ours}_norm", "scale")
        for published, ours in names
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
    def by_head(first: str, second: str) -> Tensor:
        """In each head, the rows of the first map before those of the second."""
        pieces = [Piece((*path, name, "kernel"), "i n h -> n h i") for name in (first, second)]
        return Tensor(pieces, "h", "n h i -> (n h) i")

    layout = {
        f"{key}kv_a_proj_with_mqa.weight": rows((*path, "kv_down"), (*path, "k_rope")),
        f"{key}kv_a_layernorm.weight": vector(*path, "kv_norm", "scale"),
        f"{key}kv_b_proj.weight": by_head("k_up", "v_up"),
        f"{key}o_proj.weight": heads_out(*path, "out"),
    }
    queries = by_head("q_nope", "q_rope")
    if config.q_lora_rank is None:
        return layout | {f"{key}q_proj.weight": queries}
    return layout | {
        f"{key}q_a_proj.weight": linear(*path, "q_down"),
        f"{key}q_a_layernorm.weight": vector(*path, "q_norm", "scale"),
        f"{key}q_b_proj.weight": queries,
    }


def _mamba(key: str, path: tuple, config: Any) -> Layout:
    conv = Tensor([Piece((*path, "conv_filter"), "w i -> i w")], merge="i w -> i 1 w")
    layout = {
        f"{key}in_proj.weight": rows((*path, "value"), (*path, "gate")),
        f"{key}conv1d.weight": conv,
        f"{key}x_proj.weight": rows((*path, "dt_down"), (*path, "b"), (*path, "c")),
        f"{key}dt_proj.weight": linear(*path, "dt_up"),
        f"{key}dt_proj.bias": vector(*path, "dt_up", "bias"),
        f"{key}A_log": matrix(*path, "a_log"),
        f"{key}D": vector(*path, "skip"),
        f"{key}out_proj.weight": linear(*path, "out"),
    }
    layout |= _norms(key, path, *((f"{name}_layernorm", name) for name in ("dt", "b", "c")))
    if config.conv_bias:
        layout[f"{key}conv1d.bias"] = vector(*path, "conv_bias")
    if config.proj_bias:
        biases = [Piece((*path, name, "bias"), "o -> o") for name in ("value", "gate")]
        layout[f"{key}in_proj.bias"] = Tensor(biases, "o")
        layout[f"{key}out_proj.bias"] = vector(*path, "out", "bias")
    return layout


def _gated(key: str, path: tuple) -> Layout:
    return {f"{key}{name}_proj.weight": linear(*path, name) for name in ("gate", "up", "down")}


def _experts(
    key: str,
    path: tuple,
    config: Any,
    fused: bool,
    *,
    router: str = "gate",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Layout:
    """The router and the experts.

    names: the published names of gate, up and down in files with one tensor for each expert.
    """
    layout = {f"{key}{router}.weight": linear(*path, "router", "scores")}
    key, path = f"{key}experts.", (*path, "experts")
    if fused:
        both = [Piece((*path, name, "kernel"), "e i o -> e o i") for name in ("gate", "up")]
        down = [Piece((*path, "down", "kernel"), "e i o -> e o i")]
        experts = {f"{key}gate_up_proj": Tensor(both, "o"), f"{key}down_proj": Tensor(down)}
        return layout | experts
    return layout | {
        f"{key}{e}.{name}.weight": expert(e, *path, ours)
        for e in range(config.num_experts)
        for name, ours in zip(names, ("gate", "up", "down"), strict=True)
    }
