"""Published config.json files: one table of fields for each model type, read and written by it.

A field that would change the outcome and is not understood is refused.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from slam_jax import language_models as models
from slam_jax.errors import InputError
from slam_jax.interop.fields import Field, Group, derived, only, read_fields, write_fields
from slam_jax.layers.rotary import Rope, Yarn

Table = tuple[Field, ...]

_YARN = (
    Field("factor", "factor", read=float),
    Field("original_max_position_embeddings", "original_length"),
    Field("beta_fast", "beta_fast", 32.0),
    Field("beta_slow", "beta_slow", 1.0),
    Field("mscale", "mscale", None, float),
    Field("mscale_all_dim", "mscale_all_dim", None, float),
)
# Hunyuan's files have some fields of YaRN beside its own stretching, which does not use them.
_UNUSED = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def _read_rope(
    group: Group, key: str, base: float, *, interleaved: bool = False, alpha: bool = False
) -> Rope:
    """Reads both spellings: `rope_parameters`, or `rope_theta` beside `rope_scaling`.

    alpha: whether the publisher's code knows the NTK stretching by `alpha`.
    """
    groups = {k: v for k in ("rope_parameters", key) if (v := group.data.get(k)) is not None}
    if len(groups) > 1:
        raise InputError(f"config.json: {' beside '.join(groups)}; expected one of them")
    key, data = next(iter(groups.items()), ("rope_parameters", {}))
    if not isinstance(data, Mapping):
        raise group.wrong(key, "a group of fields")
    inner = Group({"rope_theta": group.data.get("rope_theta"), **data}, f"{key}.")
    kind = data.get("rope_type", data.get("type", "default"))
    make = functools.partial(Rope, inner.get("rope_theta", float, base), interleaved)
    if kind == "default":
        rope, known = make(), ("factor",)
        inner.one_of("factor", 1.0)
    elif kind == "dynamic" and alpha:
        rope, known = make(ntk_alpha=inner.get("alpha", float)), ("alpha", *_UNUSED)
    elif kind == "yarn":
        rope = make(yarn=Yarn(**read_fields(_YARN, inner)))
        known = [field.key for field in _YARN]
    else:
        kinds = "default, yarn or dynamic (with alpha)" if alpha else "default or yarn"
        raise inner.wrong("rope_type" if "rope_type" in data else "type", kinds)
    inner.no_others(("rope_theta", "rope_type", "type", *known))
    return rope


def _write_rope(config: Any) -> dict[str, Any] | None:
    rope: Rope = config.rope
    if rope.yarn is not None:
        values = write_fields(_YARN, rope.yarn)
        return {"type": "yarn"} | {key: v for key, v in values.items() if v is not None}
    stretched = rope.ntk_alpha != 1.0
    return {"type": "dynamic", "alpha": rope.ntk_alpha, "factor": 1.0} if stretched else None


def _rope(base: float = 10_000.0, **options: bool) -> Table:
    read = functools.partial(_read_rope, base=base, **options)
    theta = derived("rope_theta", lambda c: c.rope.base)
    return theta, Field("rope_scaling", "rope", read=read, write=_write_rope)


def _read_dtype(group: Group, key: str) -> str:
    """`dtype` comes before `torch_dtype`; float16 is read as float32, as we have only bfloat16."""
    key = "dtype" if group.data.get("dtype") else key
    value = group.data.get(key) or "float32"
    if value not in ("float32", "bfloat16", "float16"):
        raise group.wrong(key, "float32, bfloat16 or float16")
    return "float32" if value == "float16" else value


def _head_dim(config: Any) -> int:
    return config.head_dim or config.embed_dim // config.num_heads


def _common(norm_epsilon: float = 1e-6) -> Table:
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
        Field("torch_dtype", "param_dtype", read=_read_dtype),
    )


_KV_HEADS = Field(
    "num_key_value_heads", "num_kv_heads", None, write=lambda c: c.num_kv_heads or c.num_heads
)

_LLAMA = (
    *_common(),
    _KV_HEADS,
    Field("head_dim", "head_dim", None),
    *_rope(),
    only("attention_bias", False, written=False),
    only("mlp_bias", False, written=False),
)

_MIXTRAL = (
    *_common(1e-5),
    _KV_HEADS,
    Field("head_dim", "head_dim", None),
    *_rope(1e6),
    Field("num_local_experts", "num_experts", 8),
    Field("num_experts_per_tok", "num_experts_per_token", 2),
    Field("router_aux_loss_coef", "balance_loss", 0.001),
    only("sliding_window", None),
)

_JAMBA = (
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
    Field("mamba_dt_rank", "dt_rank", "auto", lambda group, key: group.get_or(key, "auto")),
    Field("mamba_conv_bias", "conv_bias", True),
    Field("mamba_proj_bias", "proj_bias", False),
    derived("use_mamba_kernels", lambda _: False),
    Field("router_aux_loss_coef", "balance_loss", 0.001),
)

_LIMITED = ("topk_method", "group_limited_greedy", 1)

_DEEPSEEK_V2 = (
    *_common(),
    *_rope(interleaved=True),
    derived("num_key_value_heads", lambda c: c.num_heads),
    Field("moe_intermediate_size", "expert_dim", 1_407),
    Field("kv_lora_rank", "kv_lora_rank", 512),
    Field("q_lora_rank", "q_lora_rank", None),
    Field("qk_nope_head_dim", "qk_nope_head_dim", 128),
    Field("qk_rope_head_dim", "qk_rope_head_dim", 64),
    derived("qk_head_dim", lambda c: c.qk_nope_head_dim + c.qk_rope_head_dim),
    derived("head_dim", lambda c: c.qk_rope_head_dim),
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
    derived("seq_aux", lambda _: True),
    only("attention_bias", False),
    only("mlp_bias", False, written=False),
)

_HUNYUAN_LARGE = (
    *_common(1e-5),
    *_rope(alpha=True),
    _KV_HEADS,
    Field("attention_head_dim", "head_dim", None, write=_head_dim),
    Field("num_experts", "num_experts", 1),
    Field("moe_topk", "num_experts_per_token", 1),
    Field("num_shared_expert", "num_shared_experts", 1, when=("use_mixed_mlp_moe", True, 0)),
    Field("use_mixed_mlp_moe", None, False, write=lambda c: c.num_shared_experts > 0),
    Field("use_cla", None, False, write=lambda c: c.share_factor > 1),
    Field("cla_share_factor", "share_factor", 1, when=("use_cla", True, 1)),
    Field("use_qk_norm", "qk_norm", False),
    Field("moe_drop_tokens", None, False, write=lambda c: c.capacity_factor is not None),
    only("moe_random_routing_dropped_token", False),
    Field("capacity_factor", "capacity_factor", 1.0, when=("moe_drop_tokens", True, None)),
    only("attention_bias", False),
    only("mlp_bias", False, written=False),
    only("moe_layer_num_skipped", 0, written=False),
)

_HUNYUAN_V1_MOE = (
    *_common(1e-5),
    _KV_HEADS,
    # The publisher's code requires a number here: it does not accept null.
    Field("head_dim", "head_dim", None, write=_head_dim),
    *_rope(alpha=True),
    Field("num_experts", "num_experts", 1),
    Field("moe_topk", "num_experts_per_token", 1),
    only("attention_bias", False),
)


class Kind(NamedTuple):
    """architecture: the name of the class in the publisher's library."""

    config: type[models.LanguageModelConfig]
    architecture: str
    table: Table


KINDS: dict[str, Kind] = {
    "llama": Kind(models.StandardConfig, "LlamaForCausalLM", _LLAMA),
    "mixtral": Kind(models.MoEConfig, "MixtralForCausalLM", _MIXTRAL),
    "jamba": Kind(models.JambaConfig, "JambaForCausalLM", _JAMBA),
    "deepseek_v2": Kind(models.DeepseekV2Config, "DeepseekV2ForCausalLM", _DEEPSEEK_V2),
    "hunyuan": Kind(models.HunyuanLargeConfig, "HunYuanForCausalLM", _HUNYUAN_LARGE),
    "hunyuan_v1_moe": Kind(models.HunyuanV1MoEConfig, "HunYuanMoEV1ForCausalLM", _HUNYUAN_V1_MOE),
}


def read_config(data: Any) -> tuple[str, Any]:
    """The model_type of a published config.json, and our configuration.

    Raises InputError or ConfigError, naming the field.
    """
    if not isinstance(data, Mapping):
        raise InputError("config.json: expected a group of fields")
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise Group(data).wrong("model_type", f"one of {', '.join(KINDS)}")
    return kind, KINDS[kind].config(**read_fields(KINDS[kind].table, Group(data)))


def write_config(config: Any) -> tuple[str, dict[str, Any]]:
    """The model_type of a configuration, and its config.json.

    Raises InputError for a model that was never published in this form.
    """
    for kind, (config_type, architecture, table) in KINDS.items():
        if type(config) is config_type:
            data = {"architectures": [architecture], "model_type": kind}
            data |= write_fields(table, config)
            rope, found = (getattr(c, "rope", None) for c in (config, read_config(data)[1]))
            if rope != found:
                raise InputError(
                    f"rope is {rope}; {kind} cannot express it, and would read {found}"
                )
            return kind, data
    known = ", ".join(kind.config.__name__ for kind in KINDS.values())
    raise InputError(f"a {type(config).__name__} has no published form; expected {known}")
