"""From a published config.json to a configuration here, and back.

What is not understood and would change the outcome is refused, never passed over.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from slam_jax.errors import InputError, shorten
from slam_jax.language_models import (
    DeepseekV2Config,
    HunyuanLargeConfig,
    HunyuanV1MoEConfig,
    JambaConfig,
    LanguageModelConfig,
    MoEConfig,
    StandardConfig,
)
from slam_jax.layers.rotary import Rope, Yarn

Json = dict[str, Any]
_LARGEST = 1e30
# Of Hunyuan's files: for a form of stretching that "dynamic" with alpha is not.
_UNUSED = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


class Fields:
    """A config.json read field by field, each of the right type or an error that names it."""

    def __init__(self, data: Mapping[str, Any], group: str = ""):
        self.data, self.group = data, group

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number; a list of equal ones, one a layer, is one of them."""
        value = self.data.get(key)
        if isinstance(value, list) and value and all(each == value[0] for each in value):
            value = value[0]
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(key, "a whole number")
        return value

    def optional(self, key: str) -> int | None:
        return None if self.data.get(key) is None else self.whole(key)

    def number(self, key: str, default: float | None = None) -> float:
        value: Any = self.data.get(key)
        value = default if value is None else value
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not known or not abs(value) < _LARGEST:  # what is not a number is not below it
            raise self.wrong(key, "a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses a value that is built differently here; an absent field is the first of them."""
        value = self.data.get(key, allowed[0])
        if value not in allowed:
            raise self.wrong(key, " or ".join(map(repr, allowed)) + ", which is all that is built")

    def wrong(self, key: str, expected: str) -> InputError:
        value = shorten(repr(self.data.get(key)), 80)
        name = shorten(f"{self.group}{key}", 80)
        return InputError(f"config.json: {name!s} is {value}; expected {expected}")

    def rope(
        self, *, base: float = 10_000.0, interleaved: bool = False, alpha: bool = False
    ) -> Rope:
        """Of both spellings: `rope_parameters`, or `rope_theta` beside `rope_scaling`.

        alpha: whether the publisher's code knows the NTK stretching by `alpha`.
        """
        spellings = ("rope_parameters", "rope_scaling")
        given = {key: self.data[key] for key in spellings if self.data.get(key) is not None}
        if len(given) > 1:
            raise InputError(f"config.json: {' beside '.join(given)}; expected one of them")
        key, group = next(iter(given.items()), ("rope_parameters", {}))
        if not isinstance(group, Mapping):
            raise self.wrong(key, "a group of fields")
        inner = Fields({"rope_theta": self.data.get("rope_theta"), **group}, f"{key}.")
        kind = group.get("rope_type", group.get("type", "default"))
        theta = inner.number("rope_theta", base)
        if kind == "default":
            inner.no_others("rope_theta", "rope_type", "type", "factor")
            inner.only("factor", 1.0)
            return Rope(theta, interleaved)
        if kind == "dynamic" and alpha:
            inner.no_others("rope_theta", "rope_type", "type", "alpha", "factor", *_UNUSED)
            return Rope(theta, interleaved, ntk_alpha=inner.number("alpha"))
        if kind == "yarn":
            original = "original_max_position_embeddings"
            scales = ("mscale", "mscale_all_dim")
            betas = ("beta_fast", "beta_slow")
            inner.no_others("rope_theta", "rope_type", "type", "factor", original, *scales, *betas)
            given_scales = {
                name: None if group.get(name) is None else inner.number(name) for name in scales
            }
            yarn = Yarn(
                inner.number("factor"),
                inner.whole(original),
                inner.number("beta_fast", 32.0),
                inner.number("beta_slow", 1.0),
                **given_scales,
            )
            return Rope(theta, interleaved, yarn=yarn)
        kinds = "default, yarn or dynamic (with alpha)" if alpha else "default or yarn"
        raise inner.wrong("rope_type" if "rope_type" in group else "type", kinds)

    def no_others(self, *known: str) -> None:
        """Refuses a field that would change the outcome and is not read."""
        for key, value in self.data.items():
            if key not in known and value is not None:
                raise self.wrong(key, "nothing: it is not built")

    def common(self, *, norm_epsilon: float = 1e-6) -> Json:
        """What all of them have."""
        self.only("hidden_act", "silu")
        dtype = self.data.get("dtype") or self.data.get("torch_dtype") or "float32"
        if dtype not in ("float32", "bfloat16", "float16"):
            key = "dtype" if self.data.get("dtype") else "torch_dtype"
            raise self.wrong(key, "float32, bfloat16 or float16")
        return {
            "vocab_size": self.whole("vocab_size"),
            "embed_dim": self.whole("hidden_size"),
            "num_layers": self.whole("num_hidden_layers"),
            "num_heads": self.whole("num_attention_heads"),
            "mlp_dim": self.whole("intermediate_size"),
            "context_length": self.whole("max_position_embeddings", 2_048),
            "norm_epsilon": self.number("rms_norm_eps", norm_epsilon),
            "init_std": self.number("initializer_range", 0.02),
            "tie_embeddings": self.flag("tie_word_embeddings", False),
            # There is no half precision with five bits of exponent here.
            "param_dtype": "float32" if dtype == "float16" else dtype,
        }


class Kind(NamedTuple):
    """architecture: the name of the class in the publisher's library."""

    config: type[LanguageModelConfig]
    architecture: str
    read: Callable[[Fields], Any]
    write: Callable[[Any], Json]


def _read_llama(fields: Fields) -> StandardConfig:
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    return StandardConfig(
        **fields.common(),
        num_kv_heads=fields.optional("num_key_value_heads"),
        head_dim=fields.optional("head_dim"),
        rope=fields.rope(),
    )


def _write_llama(config: StandardConfig) -> Json:
    return {**_write_common(config), **_write_heads(config), **_write_rope(config.rope)}


def _read_mixtral(fields: Fields) -> MoEConfig:
    fields.only("sliding_window", None)
    return MoEConfig(
        **fields.common(norm_epsilon=1e-5),
        num_kv_heads=fields.optional("num_key_value_heads"),
        head_dim=fields.optional("head_dim"),
        num_experts=fields.whole("num_local_experts", 8),
        num_experts_per_token=fields.whole("num_experts_per_tok", 2),
        balance_loss=fields.number("router_aux_loss_coef", 0.001),
        rope=fields.rope(base=1e6),
    )


def _write_mixtral(config: MoEConfig) -> Json:
    return {
        **_write_common(config),
        **_write_heads(config),
        **_write_rope(config.rope),
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "router_aux_loss_coef": config.balance_loss,
        "sliding_window": None,
    }


def _read_jamba(fields: Fields) -> JambaConfig:
    auto = fields.data.get("mamba_dt_rank", "auto") == "auto"
    return JambaConfig(
        **fields.common(),
        num_kv_heads=fields.optional("num_key_value_heads"),
        num_experts=fields.whole("num_experts", 16),
        num_experts_per_token=fields.whole("num_experts_per_tok", 2),
        attention_period=fields.whole("attn_layer_period", 8),
        attention_offset=fields.whole("attn_layer_offset", 4),
        expert_period=fields.whole("expert_layer_period", 2),
        expert_offset=fields.whole("expert_layer_offset", 1),
        state_dim=fields.whole("mamba_d_state", 16),
        conv_width=fields.whole("mamba_d_conv", 4),
        expand=fields.whole("mamba_expand", 2),
        dt_rank=None if auto else fields.whole("mamba_dt_rank"),
        conv_bias=fields.flag("mamba_conv_bias", True),
        proj_bias=fields.flag("mamba_proj_bias", False),
        balance_loss=fields.number("router_aux_loss_coef", 0.001),
    )


def _write_jamba(config: JambaConfig) -> Json:
    return {
        **_write_common(config),
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "attn_layer_period": config.attention_period,
        "attn_layer_offset": config.attention_offset,
        "expert_layer_period": config.expert_period,
        "expert_layer_offset": config.expert_offset,
        "mamba_d_state": config.state_dim,
        "mamba_d_conv": config.conv_width,
        "mamba_expand": config.expand,
        "mamba_dt_rank": "auto" if config.dt_rank is None else config.dt_rank,
        "mamba_conv_bias": config.conv_bias,
        "mamba_proj_bias": config.proj_bias,
        "use_mamba_kernels": False,
        "router_aux_loss_coef": config.balance_loss,
    }


def _read_deepseek_v2(fields: Fields) -> DeepseekV2Config:
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields.only("moe_layer_freq", 1)
    fields.only("scoring_func", "softmax")
    fields.only("topk_method", "greedy", "group_limited_greedy")
    limited = fields.data.get("topk_method") == "group_limited_greedy"
    return DeepseekV2Config(
        **fields.common(),
        expert_dim=fields.whole("moe_intermediate_size", 1_407),
        kv_lora_rank=fields.whole("kv_lora_rank", 512),
        q_lora_rank=fields.optional("q_lora_rank"),
        qk_nope_head_dim=fields.whole("qk_nope_head_dim", 128),
        qk_rope_head_dim=fields.whole("qk_rope_head_dim", 64),
        v_head_dim=fields.whole("v_head_dim", 128),
        num_dense_layers=fields.whole("first_k_dense_replace", 0),
        num_experts=fields.whole("n_routed_experts", 64),
        num_experts_per_token=fields.whole("num_experts_per_tok", 6),
        num_shared_experts=fields.whole("n_shared_experts", 0),
        num_groups=fields.whole("n_group", 1) if limited else 1,
        top_groups=fields.whole("topk_group", 1) if limited else 1,
        routed_scale=fields.number("routed_scaling_factor", 1.0),
        renormalize=fields.flag("norm_topk_prob", False),
        balance_loss=fields.number("aux_loss_alpha", 0.001),
        rope=fields.rope(interleaved=True),
    )


def _write_deepseek_v2(config: DeepseekV2Config) -> Json:
    limited = config.top_groups < config.num_groups
    return {
        **_write_common(config),
        **_write_rope(config.rope),
        "num_key_value_heads": config.num_heads,
        "moe_intermediate_size": config.expert_dim,
        "kv_lora_rank": config.kv_lora_rank,
        "q_lora_rank": config.q_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "qk_head_dim": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "first_k_dense_replace": config.num_dense_layers,
        "moe_layer_freq": 1,
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "n_shared_experts": config.num_shared_experts,
        "n_group": config.num_groups,
        "topk_group": config.top_groups,
        "topk_method": "group_limited_greedy" if limited else "greedy",
        "scoring_func": "softmax",
        "routed_scaling_factor": config.routed_scale,
        "norm_topk_prob": config.renormalize,
        "aux_loss_alpha": config.balance_loss,
        "seq_aux": True,
        "attention_bias": False,
    }


def _read_hunyuan_large(fields: Fields) -> HunyuanLargeConfig:
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields.only("moe_layer_num_skipped", 0)
    fields.only("moe_random_routing_dropped_token", False)
    shared = fields.whole("num_shared_expert", 1)
    drops = fields.flag("moe_drop_tokens", False)
    return HunyuanLargeConfig(
        **fields.common(norm_epsilon=1e-5),
        num_kv_heads=fields.optional("num_key_value_heads"),
        head_dim=fields.optional("attention_head_dim"),
        num_experts=fields.whole("num_experts", 1),
        num_experts_per_token=fields.whole("moe_topk", 1),
        num_shared_experts=shared if fields.flag("use_mixed_mlp_moe", False) else 0,
        share_factor=fields.whole("cla_share_factor", 1) if fields.flag("use_cla", False) else 1,
        qk_norm=fields.flag("use_qk_norm", False),
        capacity_factor=fields.number("capacity_factor", 1.0) if drops else None,
        rope=fields.rope(alpha=True),
    )


def _write_hunyuan_large(config: HunyuanLargeConfig) -> Json:
    return {
        **_write_common(config),
        **_write_rope(config.rope),
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "attention_head_dim": config.head_dim or config.embed_dim // config.num_heads,
        "num_experts": config.num_experts,
        "moe_topk": config.num_experts_per_token,
        "num_shared_expert": config.num_shared_experts,
        "use_mixed_mlp_moe": config.num_shared_experts > 0,
        "use_cla": config.share_factor > 1,
        "cla_share_factor": config.share_factor,
        "use_qk_norm": config.qk_norm,
        "moe_drop_tokens": config.capacity_factor is not None,
        "moe_random_routing_dropped_token": False,
        "capacity_factor": config.capacity_factor or 1.0,
        "attention_bias": False,
    }


def _read_hunyuan_v1_moe(fields: Fields) -> HunyuanV1MoEConfig:
    fields.only("attention_bias", False)
    return HunyuanV1MoEConfig(
        **fields.common(norm_epsilon=1e-5),
        num_kv_heads=fields.optional("num_key_value_heads"),
        head_dim=fields.optional("head_dim"),
        num_experts=fields.whole("num_experts", 1),
        num_experts_per_token=fields.whole("moe_topk", 1),
        rope=fields.rope(alpha=True),
    )


def _write_hunyuan_v1_moe(config: HunyuanV1MoEConfig) -> Json:
    return {
        **_write_common(config),
        **_write_heads(config),
        # Their code takes this width as it stands, and null for a number.
        "head_dim": config.head_dim or config.embed_dim // config.num_heads,
        **_write_rope(config.rope),
        "num_experts": config.num_experts,
        "moe_topk": config.num_experts_per_token,
        "attention_bias": False,
    }


KINDS: dict[str, Kind] = {
    "llama": Kind(StandardConfig, "LlamaForCausalLM", _read_llama, _write_llama),
    "mixtral": Kind(MoEConfig, "MixtralForCausalLM", _read_mixtral, _write_mixtral),
    "jamba": Kind(JambaConfig, "JambaForCausalLM", _read_jamba, _write_jamba),
    "deepseek_v2": Kind(
        DeepseekV2Config, "DeepseekV2ForCausalLM", _read_deepseek_v2, _write_deepseek_v2
    ),
    "hunyuan": Kind(
        HunyuanLargeConfig, "HunYuanForCausalLM", _read_hunyuan_large, _write_hunyuan_large
    ),
    "hunyuan_v1_moe": Kind(
        HunyuanV1MoEConfig, "HunYuanMoEV1ForCausalLM", _read_hunyuan_v1_moe, _write_hunyuan_v1_moe
    ),
}


def read_config(data: Any) -> tuple[str, Any]:
    """The model_type of a published config.json, and the configuration here.

    Raises InputError or ConfigError, naming the field.
    """
    if not isinstance(data, Mapping):
        raise InputError("config.json: expected a group of fields")
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise Fields(data).wrong("model_type", f"one of {', '.join(KINDS)}")
    return kind, KINDS[kind].read(Fields(data))


def write_config(config: Any) -> tuple[str, Json]:
    """The model_type of a configuration, and its config.json.

    Raises InputError for a model that was never published in this form.
    """
    for kind, entry in KINDS.items():
        if type(config) is entry.config:
            data = {
                "architectures": [entry.architecture],
                "model_type": kind,
                **entry.write(config),
            }
            rope, found = (getattr(c, "rope", None) for c in (config, entry.read(Fields(data))))
            if rope != found:
                raise InputError(f"rope is {rope}; {kind} has no word for it, and reads {found}")
            return kind, data
    known = ", ".join(entry.config.__name__ for entry in KINDS.values())
    raise InputError(f"a {type(config).__name__} has no published form; expected {known}")


def _write_common(config: Any) -> Json:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": config.param_dtype,
    }


def _write_heads(config: Any) -> Json:
    return {
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_dim,
    }


def _write_rope(rope: Rope) -> Json:
    scaling: Json | None = None
    if rope.yarn is not None:
        yarn = rope.yarn
        scaling = {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        }
        scaling |= {} if yarn.mscale is None else {"mscale": yarn.mscale}
        scaling |= {} if yarn.mscale_all_dim is None else {"mscale_all_dim": yarn.mscale_all_dim}
    elif rope.ntk_alpha != 1.0:
        scaling = {"type": "dynamic", "alpha": rope.ntk_alpha, "factor": 1.0}
    return {"rope_theta": rope.base, "rope_scaling": scaling}
