"""Published formats: for each model type a table of its config.json and one of its tensors.

A new format is one more entry of `FORMATS`. A field that would change the outcome and is not
understood is refused, and so is a tensor that no row has.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from slam_jax import language_models as models
from slam_jax.errors import InputError
from slam_jax.interop.fields import (
    HARMLESS,
    Field,
    Fields,
    Group,
    context_of,
    only,
    rope,
    write_fields,
)
from slam_jax.interop.tensors import Layout, Params, Path, Row, Table, expand

# Patterns of einops, from our axes to the published ones. PyTorch has the outputs of a map first.
VECTOR, TABLE = "d -> d", "v d -> v d"
LINEAR, STACKED = "i o -> o i", "e i o -> e o i"
HEADS_IN, HEADS_OUT = "d n h -> (n h) d", "n h d -> d (n h)"


class Format(NamedTuple):
    """A model type of the hub.

    config: of our model. architecture: the class in the publisher's library. fields: of its
    config.json. tensors: of its files. block: the path of a layer of our model. has: whether the
    type can express a configuration of this class. further_layers: a field with the number of
    layers after those of the model, which predict further tokens and are not read.
    """

    config: type[models.LanguageModelConfig]
    architecture: str
    fields: Fields
    tensors: Table
    block: Callable[[Any, int], Path] = lambda config, layer: ("blocks", layer)
    has: Callable[[Any], bool] = lambda config: True
    further_layers: str | None = None


# Fields that change no logits, besides `HARMLESS`. Every other one that is not read has to be null,
# empty, or a switch that is off.
_HARMLESS = HARMLESS | {
    # About the file.
    *("auto_map", "transformers.js_config", "unsloth_fixed", "unsloth_version"),
    # How the publisher's library computes and returns the same logits.
    *("calc_logits_for_entire_prompt", "ep_size", "num_logits_to_keep", "output_router_logits"),
    *("pretraining_tp", "use_associative_scan", "use_mambapy", "use_mamba_kernels"),
    # Training.
    *("hidden_dropout", "router_jitter_noise", "seq_aux"),
    # Tokens.
    *("eod_token_id", "im_end_id", "im_newline_id", "im_start_id", "image_token_id"),
    *("mask_init_id", "org_vocab_size", "pad_id", "text_end_id", "text_start_id"),
    # They repeat other fields.
    *("is_llama_config", "layers_block_type", "max_window_layers", "qk_head_dim"),
    # Heads of classifiers.
    *("add_classification_head", "class_num", "pool_type"),
}


_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float32"}
_DTYPES |= {"fp32": "float32", "bf16": "bfloat16", "fp16": "float32", "auto": "float32"}


def read_dtype(group: Group, key: str) -> str:
    """`dtype` comes before `torch_dtype`; float16 is read as float32, as we have only bfloat16.

    Parameters get the dtype of the stored weights, whatever the field says.
    """
    key = "dtype" if group.data.get("dtype") else key
    value = group.data.get(key) or "float32"
    if not isinstance(value, str) or value not in _DTYPES:
        raise group.wrong(key, "float32, bfloat16, float16 or auto")
    return _DTYPES[value]


def _read_rank(group: Group, key: str) -> int | None:
    return None if group.data.get(key, "auto") == "auto" else group.get(key, int)


def _read_q_rank(group: Group, key: str) -> int | None:
    """Null is full rank; an absent field is the publisher's default."""
    return group.get(key, int, None) if key in group.data else 1_536


def _read_choices(group: Group, key: str) -> int:
    """With one expert there is no choice, whatever the field says."""
    return 1 if group.get("num_experts", int, 16) == 1 else group.get(key, int, 2)


def _head_dim(config: Any) -> int:
    return config.head_dim or config.embed_dim // config.num_heads


def _common(norm_epsilon: float = 1e-6) -> Fields:
    return (
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "embed_dim"),
        Field("intermediate_size", "mlp_dim"),
        Field("num_hidden_layers", "num_layers"),
        Field("num_attention_heads", "num_heads"),
        only("hidden_act", "silu", "swish"),
        context_of(),
        Field("initializer_range", "init_std", 0.02),
        Field("rms_norm_eps", "norm_epsilon", norm_epsilon),
        Field("tie_word_embeddings", "tie_embeddings", False),
        Field("torch_dtype", "param_dtype", read=read_dtype),
    )


_KV_HEADS = Field(
    "num_key_value_heads", "num_kv_heads", None, write=lambda c: c.num_kv_heads or c.num_heads
)
_NO_BIASES = (only("attention_bias", False), only("mlp_bias", False))
_LAYERS = ("full_attention", "sliding_attention")


def _read_window(group: Group, key: str) -> int | None:
    """A window as long as the context, or longer, is none."""
    if group.data.get("use_sliding_window", True) is False:
        return None
    window = group.get(key, int, None)
    longest = group.get("max_position_embeddings", int, 2_048)
    return None if window is None or window >= longest else window


def _read_window_layers(group: Group, key: str) -> tuple[bool, ...] | None:
    """Which layers have the window: as they are listed, else those from `max_window_layers` on."""
    if _read_window(group, "sliding_window") is None:
        return None
    count, listed = group.get("num_hidden_layers", int), group.data.get(key)
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != count or set(listed) - {*_LAYERS}:
            raise group.wrong(key, f"a list with one of {', '.join(_LAYERS)} for each layer")
        layers = tuple(kind == _LAYERS[1] for kind in listed)
    else:
        first = group.get("max_window_layers", int, 0)
        layers = tuple(i >= first for i in range(count))
    return None if all(layers) else layers


def _layer_types(config: Any) -> list[str]:
    return [_LAYERS[config.window_of(i) is not None] for i in range(config.num_layers)]


def _all_full(group: Group, key: str) -> None:
    """For types without windows: the layers must not have any."""
    listed = group.data.get(key)
    if listed is not None and (not isinstance(listed, list) or {*listed} - {_LAYERS[0]}):
        raise group.wrong(key, f"{_LAYERS[0]} alone")


_FULL_LAYERS = Field("layer_types", read=_all_full, write=lambda _: ...)
_WINDOWS = (
    Field("sliding_window", "window", None, _read_window),
    Field("layer_types", "window_layers", None, _read_window_layers, _layer_types),
)


def _fixed(attribute: str, value: Any) -> Field:
    """An attribute that a type always has, and no field for."""
    return Field(f"={attribute}", attribute, read=lambda *_: value, write=lambda _: ...)


def _biases(config: Any) -> tuple[bool, bool, bool]:
    return config.qkv_bias, config.out_bias, config.mlp_bias


_LIMITED, _MIXED = ("topk_method", "group_limited_greedy", 1), ("use_mixed_mlp_moe", True, 0)


def _model(*layer: Table, norm: str = "model.norm") -> Table:
    """The tensors of a whole model, from those of a layer."""
    top = {
        "model.embed_tokens.weight": Row("embedding.embedding", TABLE),
        f"{norm}.weight": Row("norm.scale", VECTOR),
        "lm_head.weight": Row("head.kernel", LINEAR),
    }
    return top | {f"model.layers.{{i}}.{k}": row for table in layer for k, row in table.items()}


def _norms(**names: str) -> Table:
    """names: our norms by their published names."""
    return {f"{theirs}.weight": Row(f"{ours}.scale", VECTOR) for theirs, ours in names.items()}


def _attention(ours: str = "attention", keys: str | None = None) -> Table:
    """keys: where our keys and values are, None = in the attention. Biases are read where our model
    has them."""
    keys = keys or ours
    return {
        "self_attn.q_proj.bias": Row(f"{ours}.query.bias", "n h -> (n h)"),
        "self_attn.k_proj.bias": Row(f"{keys}.key.bias", "n h -> (n h)"),
        "self_attn.v_proj.bias": Row(f"{keys}.value.bias", "n h -> (n h)"),
        "self_attn.o_proj.bias": Row(f"{ours}.out.bias", VECTOR),
        "self_attn.q_proj.weight": Row(f"{ours}.query.kernel", HEADS_IN),
        "self_attn.k_proj.weight": Row(f"{keys}.key.kernel", HEADS_IN),
        "self_attn.v_proj.weight": Row(f"{keys}.value.kernel", HEADS_IN),
        "self_attn.o_proj.weight": Row(f"{ours}.out.kernel", HEADS_OUT),
    }


def _gated(theirs: str, ours: str = "mlp") -> Table:
    parts = ("gate", "up", "down")
    biases = {f"{theirs}.{p}_proj.bias": Row(f"{ours}.{p}.bias", VECTOR) for p in parts}
    return biases | {f"{theirs}.{p}_proj.weight": Row(f"{ours}.{p}.kernel", LINEAR) for p in parts}


def _experts(
    mlp: str,
    router: str = "gate",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    fused_mlp: str | None = None,
) -> Table:
    """The router and the experts; one tensor for each expert as on the hub, or for all experts of a
    layer as transformers 5 has them in memory.

    names: the published names of gate, up and down. fused_mlp: instead of `mlp` in fused files.
    """
    is_fused, is_not = (lambda _, fused: fused), (lambda _, fused: not fused)
    scores = "mlp.router.scores.kernel"
    gate, up, down = ours = [f"mlp.experts.{part}.kernel" for part in ("gate", "up", "down")]
    rows = {
        f"{mlp}.{router}.weight": Row(scores, LINEAR, lambda _, fused: not fused or not fused_mlp),
        f"{fused_mlp or mlp}.experts.gate_up_proj": Row(f"{gate} {up}", STACKED, is_fused),
        f"{fused_mlp or mlp}.experts.down_proj": Row(down, STACKED, is_fused),
    }
    for name, path in zip(names, ours, strict=True):
        rows[f"{mlp}.experts.{{e}}.{name}.weight"] = Row(path, LINEAR, is_not)
    if fused_mlp:
        rows[f"{fused_mlp}.{router}.weight"] = Row(scores, LINEAR, is_fused)
    return rows


_PRE_NORMS = _norms(input_layernorm="attention_norm", post_attention_layernorm="mlp_norm")
_STANDARD = _model(_PRE_NORMS, _attention(), _gated("mlp"))


def _qk_norms(queries: str, keys: str) -> Table:
    return {
        f"self_attn.{queries}.weight": Row("attention.q_norm.scale", VECTOR),
        f"self_attn.{keys}.weight": Row("attention.k_norm.scale", VECTOR),
    }


_QK_NORMS = _qk_norms("query_layernorm", "key_layernorm")
_QUERIES = "attention.q_nope.kernel attention.q_rope.kernel"
_LATENT_ATTENTION = {
    "self_attn.q_proj.weight": Row(_QUERIES, HEADS_IN, lambda c, _: c.q_lora_rank is None),
    "self_attn.q_a_proj.weight": Row("attention.q_down.kernel", LINEAR),
    "self_attn.q_a_layernorm.weight": Row("attention.q_norm.scale", VECTOR),
    "self_attn.q_b_proj.weight": Row(_QUERIES, HEADS_IN, lambda c, _: c.q_lora_rank is not None),
    "self_attn.kv_a_proj_with_mqa.weight": Row(
        "attention.kv_down.kernel attention.k_rope.kernel", LINEAR
    ),
    "self_attn.kv_a_layernorm.weight": Row("attention.kv_norm.scale", VECTOR),
    "self_attn.kv_b_proj.weight": Row("attention.k_up.kernel attention.v_up.kernel", HEADS_IN),
    "self_attn.o_proj.weight": Row("attention.out.kernel", HEADS_OUT),
}
_MAMBA = {
    "mamba.in_proj.weight": Row("mixer.value.kernel mixer.gate.kernel", LINEAR),
    "mamba.in_proj.bias": Row("mixer.value.bias mixer.gate.bias", VECTOR),
    "mamba.conv1d.weight": Row("mixer.conv_filter", "w i -> i 1 w"),
    "mamba.conv1d.bias": Row("mixer.conv_bias", VECTOR),
    "mamba.x_proj.weight": Row("mixer.dt_down.kernel mixer.b.kernel mixer.c.kernel", LINEAR),
    "mamba.dt_layernorm.weight": Row("mixer.dt_norm.scale", VECTOR),
    "mamba.b_layernorm.weight": Row("mixer.b_norm.scale", VECTOR),
    "mamba.c_layernorm.weight": Row("mixer.c_norm.scale", VECTOR),
    "mamba.dt_proj.weight": Row("mixer.dt_up.kernel", LINEAR),
    "mamba.dt_proj.bias": Row("mixer.dt_up.bias", VECTOR),
    "mamba.A_log": Row("mixer.a_log", TABLE),
    "mamba.D": Row("mixer.skip", VECTOR),
    "mamba.out_proj.weight": Row("mixer.out.kernel", LINEAR),
    "mamba.out_proj.bias": Row("mixer.out.bias", VECTOR),
}

_DEEPSEEK = _model(
    _PRE_NORMS,
    _LATENT_ATTENTION,
    _gated("mlp"),
    _experts("mlp"),
    {"mlp.gate.e_score_correction_bias": Row("mlp.router.choice_bias", VECTOR)},
    _gated("mlp.shared_experts", "mlp.shared"),
)
_LATENT = (
    Field("num_key_value_heads", write=lambda c: c.num_heads),
    Field("kv_lora_rank", "kv_lora_rank", 512),
    Field("q_lora_rank", "q_lora_rank", None, _read_q_rank),
    Field("qk_nope_head_dim", "qk_nope_head_dim", 128),
    Field("qk_rope_head_dim", "qk_rope_head_dim", 64),
    Field("qk_head_dim", write=lambda c: c.qk_nope_head_dim + c.qk_rope_head_dim),
    Field("head_dim", write=lambda c: c.qk_rope_head_dim),
    Field("v_head_dim", "v_head_dim", 128),
)

FORMATS: dict[str, Format] = {
    "llama": Format(
        models.StandardConfig,
        "LlamaForCausalLM",
        fields=(
            *_common(),
            _KV_HEADS,
            Field("head_dim", "head_dim", None),
            *rope(),
            Field("attention_bias", "qkv_bias", False),
            Field("attention_bias", "out_bias", False),
            Field("mlp_bias", "mlp_bias", False),
            only("rope_interleaved", False)._replace(write=lambda _: ...),
            _FULL_LAYERS,
        ),
        tensors=_STANDARD,
        has=lambda c: c.qk_norm is None and c.window is None and c.qkv_bias == c.out_bias,
    ),
    "mistral": Format(
        models.StandardConfig,
        "MistralForCausalLM",
        fields=(
            *_common(),
            _KV_HEADS,
            Field("head_dim", "head_dim", None, write=_head_dim),
            *rope(),
            *_WINDOWS,
        ),
        tensors=_STANDARD,
        has=lambda c: c.qk_norm is None and not any(_biases(c)) and c.window_layers is None,
    ),
    "qwen2": Format(
        models.StandardConfig,
        "Qwen2ForCausalLM",
        fields=(
            *_common(),
            _KV_HEADS,
            *rope(),
            *_WINDOWS,
            Field("use_sliding_window", write=lambda c: c.window is not None),
            _fixed("qkv_bias", True),
        ),
        tensors=_STANDARD,
        has=lambda c: (
            c.qk_norm is None
            and _biases(c) == (True, False, False)
            and c.head_dim in (None, c.embed_dim // c.num_heads)
        ),
    ),
    "qwen3": Format(
        models.StandardConfig,
        "Qwen3ForCausalLM",
        fields=(
            *_common(),
            _KV_HEADS,
            Field("head_dim", "head_dim", 128, write=_head_dim),
            *rope(),
            *_WINDOWS,
            Field("use_sliding_window", write=lambda c: c.window is not None),
            Field("attention_bias", "qkv_bias", False),
            Field("attention_bias", "out_bias", False),
            _fixed("qk_norm", "before_rotation"),
        ),
        tensors=_model(_PRE_NORMS, _attention(), _qk_norms("q_norm", "k_norm"), _gated("mlp")),
        has=lambda c: (
            c.qk_norm == "before_rotation" and c.qkv_bias == c.out_bias and not c.mlp_bias
        ),
    ),
    "hunyuan_v1_dense": Format(
        models.StandardConfig,
        "HunYuanDenseV1ForCausalLM",
        fields=(
            *_common(1e-5),
            _KV_HEADS,
            # The publisher's code requires a number here: it does not accept null.
            Field("head_dim", "head_dim", None, write=_head_dim),
            *rope(alpha=True),
            only("attention_bias", False),
            only("use_qk_norm", True),
            _fixed("qk_norm", "after_rotation"),
            _FULL_LAYERS,
        ),
        tensors=_model(_PRE_NORMS, _attention(), _QK_NORMS, _gated("mlp")),
        has=lambda c: c.qk_norm == "after_rotation" and c.window is None and not any(_biases(c)),
    ),
    "mixtral": Format(
        models.MoEConfig,
        "MixtralForCausalLM",
        fields=(
            *_common(1e-5),
            _KV_HEADS,
            Field("head_dim", "head_dim", None),
            *rope(1e6),
            Field("num_local_experts", "num_experts", 8),
            Field("num_experts_per_tok", "num_experts_per_token", 2),
            Field("router_aux_loss_coef", "balance_loss", 0.001),
            only("sliding_window", None),
        ),
        tensors=_model(
            _PRE_NORMS,
            _attention(),
            _experts("block_sparse_moe", names=("w1", "w3", "w2"), fused_mlp="mlp"),
        ),
    ),
    "jamba": Format(
        models.JambaConfig,
        "JambaForCausalLM",
        fields=(
            *_common(),
            _KV_HEADS._replace(default=8),
            Field("num_experts", "num_experts", 16),
            Field("num_experts_per_tok", "num_experts_per_token", 2, _read_choices),
            Field("attn_layer_period", "attention_period", 8),
            Field("attn_layer_offset", "attention_offset", 4),
            Field("expert_layer_period", "expert_period", 2),
            Field("expert_layer_offset", "expert_offset", 1),
            Field("mamba_d_state", "state_dim", 16),
            Field("mamba_d_conv", "conv_width", 4),
            Field("mamba_expand", "expand", 2),
            Field("mamba_dt_rank", "dt_rank", "auto", _read_rank),
            Field("mamba_conv_bias", "conv_bias", True),
            Field("mamba_proj_bias", "proj_bias", False),
            Field("use_mamba_kernels", write=lambda _: False),
            Field("router_aux_loss_coef", "balance_loss", 0.001),
        ),
        tensors=_model(
            _norms(input_layernorm="mixer_norm", pre_ff_layernorm="mlp_norm"),
            _attention("mixer"),
            _MAMBA,
            _gated("feed_forward"),
            _experts("feed_forward", "router"),
            norm="model.final_layernorm",
        ),
    ),
    "deepseek_v2": Format(
        models.DeepseekV2Config,
        "DeepseekV2ForCausalLM",
        fields=(
            *_common(),
            *rope(interleaved=True),
            *_LATENT,
            Field("moe_intermediate_size", "expert_dim", 1_407),
            Field("first_k_dense_replace", "num_dense_layers", 0),
            only("moe_layer_freq", 1),
            Field("n_routed_experts", "num_experts", 64),
            Field("num_experts_per_tok", "num_experts_per_token", 6),
            Field("n_shared_experts", "num_shared_experts", 0),
            Field("n_group", "num_groups", 1, when=_LIMITED),
            Field("topk_group", "top_groups", 1, when=_LIMITED),
            only("topk_method", "greedy", "group_limited_greedy")._replace(
                write=lambda c: _LIMITED[1] if c.top_groups < c.num_groups else "greedy"
            ),
            only("scoring_func", "softmax"),
            Field("routed_scaling_factor", "routed_scale", 1.0),
            Field("norm_topk_prob", "renormalize", False),
            Field("aux_loss_alpha", "balance_loss", 0.001),
            Field("seq_aux", write=lambda _: True),
            *_NO_BIASES,
        ),
        tensors=_DEEPSEEK,
        has=lambda c: not c.sigmoid,
    ),
    "deepseek_v3": Format(
        models.DeepseekV2Config,
        "DeepseekV3ForCausalLM",
        fields=(
            *_common(),
            *rope(interleaved=True, interleave_key="rope_interleave"),
            *_LATENT,
            Field("moe_intermediate_size", "expert_dim", 2_048),
            Field("first_k_dense_replace", "num_dense_layers", 3),
            only("moe_layer_freq", 1),
            Field("n_routed_experts", "num_experts", 256),
            Field("num_experts_per_tok", "num_experts_per_token", 8),
            Field("n_shared_experts", "num_shared_experts", 1),
            Field("n_group", "num_groups", 8),
            Field("topk_group", "top_groups", 4),
            only("topk_method", "noaux_tc"),
            only("scoring_func", "sigmoid"),
            Field("routed_scaling_factor", "routed_scale", 2.5),
            Field("norm_topk_prob", "renormalize", True),
            Field("aux_loss_alpha", "balance_loss", 0.0),
            _fixed("sigmoid", True),
            only("attention_bias", False),
            Field("num_nextn_predict_layers", write=lambda _: 0),
        ),
        tensors=_DEEPSEEK,
        has=lambda c: c.sigmoid,
        further_layers="num_nextn_predict_layers",
    ),
    "hunyuan": Format(
        models.HunyuanLargeConfig,
        "HunYuanForCausalLM",
        fields=(
            *_common(1e-5),
            *rope(alpha=True),
            _KV_HEADS,
            Field("attention_head_dim", "head_dim", None, write=_head_dim),
            Field("num_experts", "num_experts", 1),
            Field("moe_topk", "num_experts_per_token", 1),
            Field("num_shared_expert", "num_shared_experts", 1, when=_MIXED),
            Field("use_mixed_mlp_moe", None, False, write=lambda c: c.num_shared_experts > 0),
            Field("use_cla", None, False, write=lambda c: c.share_factor > 1),
            Field("cla_share_factor", "share_factor", 1, when=("use_cla", True, 1)),
            Field("use_qk_norm", "qk_norm", False),
            Field("moe_drop_tokens", None, False, write=lambda c: c.capacity_factor is not None),
            only("moe_random_routing_dropped_token", False),
            Field("capacity_factor", "capacity_factor", 1.0, when=("moe_drop_tokens", True, None)),
            *_NO_BIASES,
            only("moe_layer_num_skipped", 0),
        ),
        tensors=_model(
            _PRE_NORMS,
            _attention(keys="key_values"),
            _QK_NORMS,
            _experts("mlp", "gate.wg"),
            _gated("mlp.shared_mlp", "mlp.shared"),
        ),
        block=lambda c, i: ("blocks", i // c.share_factor, "layers", i % c.share_factor),
    ),
    "hunyuan_v1_moe": Format(
        models.HunyuanV1MoEConfig,
        "HunYuanMoEV1ForCausalLM",
        fields=(
            *_common(1e-5),
            _KV_HEADS,
            # The publisher's code requires a number here: it does not accept null.
            Field("head_dim", "head_dim", None, write=_head_dim),
            *rope(alpha=True),
            Field("num_experts", "num_experts", 1),
            Field("moe_topk", "num_experts_per_token", 1),
            only("attention_bias", False),
        ),
        tensors=_model(
            _PRE_NORMS,
            _attention(),
            _QK_NORMS,
            _experts("mlp", "gate.wg"),
            _gated("mlp.shared_mlp", "mlp.shared"),
        ),
    ),
}


def read_config(data: Any) -> tuple[str, Any]:
    """The model_type of a published config.json, and our configuration.

    Raises InputError or ConfigError, naming the field.
    """
    if not isinstance(data, Mapping):
        raise InputError("config.json: expected a group of fields")
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise Group(data).wrong("model_type", f"one of {', '.join(FORMATS)}")
    fields = FORMATS[kind].fields
    known = {field.key for field in fields} | _HARMLESS
    known |= {"dtype", "original_max_position_embeddings", "rope_parameters"}
    for key in sorted(data.keys() - known, key=str):
        is_off = str(key).startswith("use_") and data[key] is False
        if not is_off and data[key] not in (None, {}, [], ""):
            raise Group(data).wrong(key, f"nothing: it is not built for {kind}")
    return kind, FORMATS[kind].config(**Group(data).read(fields))


def skipped_layers(data: Mapping[str, Any], kind: str, config: Any) -> tuple[str, ...]:
    """The beginnings of the names of tensors that are not read: those of `further_layers`."""
    field = FORMATS[kind].further_layers
    count = 0 if field is None else Group(data).get(field, int, 0)
    if not 0 <= count <= 512:
        raise Group(data).wrong(str(field), "a number of layers up to 512")
    return tuple(f"model.layers.{config.num_layers + i}." for i in range(count))


def write_config(config: Any) -> tuple[str, dict[str, Any]]:
    """The model_type of a configuration, and its config.json.

    Raises InputError for a model that was never published in this form.
    """
    for kind, form in FORMATS.items():
        if type(config) is form.config and form.has(config):
            data = {"architectures": [form.architecture], "model_type": kind}
            data |= write_fields(form.fields, config)
            rope, found = (getattr(c, "rope", None) for c in (config, read_config(data)[1]))
            if rope != found:
                problem = f"{kind} cannot express it, and would read {found}"
                raise InputError(f"rope is {rope}; {problem}")
            return kind, data
    known = {form.config for form in FORMATS.values()}
    if type(config) in known:
        raise InputError(f"{config} has no published form: no model type has all of its switches")
    names = ", ".join(sorted(each.__name__ for each in known))
    raise InputError(f"a {type(config).__name__} has no published form; expected {names}")


def make_layout(kind: str, config: Any, shapes: Params, *, fused: bool = False) -> Layout:
    """The tensor behind every name that files of this model have; see `expand`."""
    blocks = [FORMATS[kind].block(config, layer) for layer in range(config.num_layers)]
    return expand(FORMATS[kind].tensors, config, shapes, blocks, fused=fused)
