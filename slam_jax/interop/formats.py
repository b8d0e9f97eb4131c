"""Published formats: for each model type a table of its config.json and one of its tensors.

A new format is one more entry of `FORMATS`. A field that would change the outcome and is not
understood is refused, and so is a tensor that no row has.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from slam_jax import language_models as models
from slam_jax.errors import InputError
from slam_jax.interop.fields import Field, Fields, Group, only, rope, write_fields
from slam_jax.interop.tensors import Layout, Params, Path, Row, Table, expand

# Patterns of einops, from our axes to the published ones. PyTorch has the outputs of a map first.
VECTOR, TABLE = "d -> d", "v d -> v d"
LINEAR, STACKED = "i o -> o i", "e i o -> e o i"
HEADS_IN, HEADS_OUT = "d n h -> (n h) d", "n h d -> d (n h)"


class Format(NamedTuple):
    """A model type of the hub.

    config: of our model. architecture: the class in the publisher's library. fields: of its
    config.json. tensors: of its files. block: the path of a layer of our model.
    """

    config: type[models.LanguageModelConfig]
    architecture: str
    fields: Fields
    tensors: Table
    block: Callable[[Any, int], Path] = lambda config, layer: ("blocks", layer)


def read_dtype(group: Group, key: str) -> str:
    """`dtype` comes before `torch_dtype`; float16 is read as float32, as we have only bfloat16."""
    key = "dtype" if group.data.get("dtype") else key
    value = group.data.get(key) or "float32"
    if value not in ("float32", "bfloat16", "float16"):
        raise group.wrong(key, "float32, bfloat16 or float16")
    return "float32" if value == "float16" else value


def _read_rank(group: Group, key: str) -> int | None:
    return None if group.data.get(key, "auto") == "auto" else group.get(key, int)


def _head_dim(config: Any) -> int:
    return config.head_dim or config.embed_dim // config.num_heads


def _common(norm_epsilon: float = 1e-6) -> Fields:
    return (
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "embed_dim"),
        Field("intermediate_size", "mlp_dim"),
        Field("num_hidden_layers", "num_layers"),
        Field("num_attention_heads", "num_heads"),
        only("hidden_act", "silu"),
        Field("max_position_embeddings", "context_length", 2_048),
        Field("initializer_range", "init_std", 0.02),
        Field("rms_norm_eps", "norm_epsilon", norm_epsilon),
        Field("tie_word_embeddings", "tie_embeddings", False),
        Field("torch_dtype", "param_dtype", read=read_dtype),
    )


_KV_HEADS = Field(
    "num_key_value_heads", "num_kv_heads", None, write=lambda c: c.num_kv_heads or c.num_heads
)
_NO_BIASES = (only("attention_bias", False), only("mlp_bias", False))
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
    """keys: where our keys and values are, None = in the attention."""
    keys = keys or ours
    return {
        "self_attn.q_proj.weight": Row(f"{ours}.query.kernel", HEADS_IN),
        "self_attn.k_proj.weight": Row(f"{keys}.key.kernel", HEADS_IN),
        "self_attn.v_proj.weight": Row(f"{keys}.value.kernel", HEADS_IN),
        "self_attn.o_proj.weight": Row(f"{ours}.out.kernel", HEADS_OUT),
    }


def _gated(theirs: str, ours: str = "mlp") -> Table:
    parts = ("gate", "up", "down")
    return {f"{theirs}.{p}_proj.weight": Row(f"{ours}.{p}.kernel", LINEAR) for p in parts}


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
_QK_NORMS = {
    "self_attn.query_layernorm.weight": Row("attention.q_norm.scale", VECTOR),
    "self_attn.key_layernorm.weight": Row("attention.k_norm.scale", VECTOR),
}
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

FORMATS: dict[str, Format] = {
    "llama": Format(
        models.StandardConfig,
        "LlamaForCausalLM",
        fields=(
            *_common(),
            _KV_HEADS,
            Field("head_dim", "head_dim", None),
            *rope(),
            *_NO_BIASES,
        ),
        tensors=_model(_PRE_NORMS, _attention(), _gated("mlp")),
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
            _KV_HEADS,
            Field("num_experts", "num_experts", 16),
            Field("num_experts_per_tok", "num_experts_per_token", 2),
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
            Field("num_key_value_heads", write=lambda c: c.num_heads),
            Field("moe_intermediate_size", "expert_dim", 1_407),
            Field("kv_lora_rank", "kv_lora_rank", 512),
            Field("q_lora_rank", "q_lora_rank", None),
            Field("qk_nope_head_dim", "qk_nope_head_dim", 128),
            Field("qk_rope_head_dim", "qk_rope_head_dim", 64),
            Field("qk_head_dim", write=lambda c: c.qk_nope_head_dim + c.qk_rope_head_dim),
            Field("head_dim", write=lambda c: c.qk_rope_head_dim),
            Field("v_head_dim", "v_head_dim", 128),
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
        tensors=_model(
            _PRE_NORMS,
            _LATENT_ATTENTION,
            _gated("mlp"),
            _experts("mlp"),
            _gated("mlp.shared_experts", "mlp.shared"),
        ),
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
    return kind, FORMATS[kind].config(**Group(data).read(FORMATS[kind].fields))


def write_config(config: Any) -> tuple[str, dict[str, Any]]:
    """The model_type of a configuration, and its config.json.

    Raises InputError for a model that was never published in this form.
    """
    for kind, form in FORMATS.items():
        if type(config) is form.config:
            data = {"architectures": [form.architecture], "model_type": kind}
            data |= write_fields(form.fields, config)
            rope, found = (getattr(c, "rope", None) for c in (config, read_config(data)[1]))
            if rope != found:
                problem = f"{kind} cannot express it, and would read {found}"
                raise InputError(f"rope is {rope}; {problem}")
            return kind, data
    known = ", ".join(form.config.__name__ for form in FORMATS.values())
    raise InputError(f"a {type(config).__name__} has no published form; expected {known}")


def make_layout(kind: str, config: Any, shapes: Params, *, fused: bool = False) -> Layout:
    """The tensor behind every name that files of this model have; see `expand`."""
    blocks = [FORMATS[kind].block(config, layer) for layer in range(config.num_layers)]
    return expand(FORMATS[kind].tensors, config, shapes, blocks, fused=fused)
