"""Published formats: for each model type a table of its config.json and one of its tensors.

A new format is one more entry of `FORMATS`. A field that would change the outcome and is not
understood is refused, and so is a tensor that no row has.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from slam_jax import language_models as models
from slam_jax.errors import InputError
from slam_jax.interop.common_fields import (
    FULL_LAYERS,
    KV_HEADS,
    LATENT,
    NO_BIASES,
    WINDOWS,
    biases,
    common,
    fixed,
    head_dim,
    read_choices,
    read_rank,
)
from slam_jax.interop.fields import HARMLESS, Field, Fields, Group, only, rope, write_fields
from slam_jax.interop.tensor_tables import (
    DEEPSEEK,
    MAMBA,
    PRE_NORMS,
    QK_NORMS,
    STANDARD,
    attention,
    experts,
    gated,
    model,
    norms,
    qk_norms,
)
from slam_jax.interop.tensors import Layout, Params, Path, Table, expand


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
    *("auto_map", "slam_jax_weights", "transformers.js_config", "unsloth_fixed", "unsloth_version"),
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


_LIMITED, _MIXED = ("topk_method", "group_limited_greedy", 1), ("use_mixed_mlp_moe", True, 0)

FORMATS: dict[str, Format] = {
    "llama": Format(
        models.StandardConfig,
        "LlamaForCausalLM",
        fields=(
            *common(),
            KV_HEADS,
            Field("head_dim", "head_dim", None),
            *rope(),
            Field("attention_bias", "qkv_bias", False),
            Field("attention_bias", "out_bias", False),
            Field("mlp_bias", "mlp_bias", False),
            only("rope_interleaved", False)._replace(write=lambda _: ...),
            FULL_LAYERS,
        ),
        tensors=STANDARD,
        has=lambda c: c.qk_norm is None and c.window is None and c.qkv_bias == c.out_bias,
    ),
    "mistral": Format(
        models.StandardConfig,
        "MistralForCausalLM",
        fields=(
            *common(),
            KV_HEADS,
            Field("head_dim", "head_dim", None, write=head_dim),
            *rope(),
            *WINDOWS,
        ),
        tensors=STANDARD,
        has=lambda c: c.qk_norm is None and not any(biases(c)) and c.window_layers is None,
    ),
    "qwen2": Format(
        models.StandardConfig,
        "Qwen2ForCausalLM",
        fields=(
            *common(),
            KV_HEADS,
            *rope(),
            *WINDOWS,
            Field("use_sliding_window", write=lambda c: c.window is not None),
            fixed("qkv_bias", True),
        ),
        tensors=STANDARD,
        has=lambda c: (
            c.qk_norm is None
            and biases(c) == (True, False, False)
            and c.head_dim in (None, c.embed_dim // c.num_heads)
        ),
    ),
    "qwen3": Format(
        models.StandardConfig,
        "Qwen3ForCausalLM",
        fields=(
            *common(),
            KV_HEADS,
            Field("head_dim", "head_dim", 128, write=head_dim),
            *rope(),
            *WINDOWS,
            Field("use_sliding_window", write=lambda c: c.window is not None),
            Field("attention_bias", "qkv_bias", False),
            Field("attention_bias", "out_bias", False),
            fixed("qk_norm", "before_rotation"),
        ),
        tensors=model(PRE_NORMS, attention(), qk_norms("q_norm", "k_norm"), gated("mlp")),
        has=lambda c: (
            c.qk_norm == "before_rotation" and c.qkv_bias == c.out_bias and not c.mlp_bias
        ),
    ),
    "hunyuan_v1_dense": Format(
        models.StandardConfig,
        "HunYuanDenseV1ForCausalLM",
        fields=(
            *common(1e-5),
            KV_HEADS,
            # The publisher's code requires a number here: it does not accept null.
            Field("head_dim", "head_dim", None, write=head_dim),
            *rope(alpha=True),
            only("attention_bias", False),
            only("use_qk_norm", True),
            fixed("qk_norm", "after_rotation"),
            FULL_LAYERS,
        ),
        tensors=model(PRE_NORMS, attention(), QK_NORMS, gated("mlp")),
        has=lambda c: c.qk_norm == "after_rotation" and c.window is None and not any(biases(c)),
    ),
    "mixtral": Format(
        models.MoEConfig,
        "MixtralForCausalLM",
        fields=(
            *common(1e-5),
            KV_HEADS,
            Field("head_dim", "head_dim", None),
            *rope(1e6),
            Field("num_local_experts", "num_experts", 8),
            Field("num_experts_per_tok", "num_experts_per_token", 2),
            Field("router_aux_loss_coef", "balance_loss", 0.001),
            only("sliding_window", None),
        ),
        tensors=model(
            PRE_NORMS,
            attention(),
            experts("block_sparse_moe", names=("w1", "w3", "w2"), fused_mlp="mlp"),
        ),
    ),
    "jamba": Format(
        models.JambaConfig,
        "JambaForCausalLM",
        fields=(
            *common(),
            KV_HEADS._replace(default=8),
            Field("num_experts", "num_experts", 16),
            Field("num_experts_per_tok", "num_experts_per_token", 2, read_choices),
            Field("attn_layer_period", "attention_period", 8),
            Field("attn_layer_offset", "attention_offset", 4),
            Field("expert_layer_period", "expert_period", 2),
            Field("expert_layer_offset", "expert_offset", 1),
            Field("mamba_d_state", "state_dim", 16),
            Field("mamba_d_conv", "conv_width", 4),
            Field("mamba_expand", "expand", 2),
            Field("mamba_dt_rank", "dt_rank", "auto", read_rank),
            Field("mamba_conv_bias", "conv_bias", True),
            Field("mamba_proj_bias", "proj_bias", False),
            Field("use_mamba_kernels", write=lambda _: False),
            Field("router_aux_loss_coef", "balance_loss", 0.001),
        ),
        tensors=model(
            norms(input_layernorm="mixer_norm", pre_ff_layernorm="mlp_norm"),
            attention("mixer"),
            MAMBA,
            gated("feed_forward"),
            experts("feed_forward", "router"),
            norm="model.final_layernorm",
        ),
    ),
    "deepseek_v2": Format(
        models.DeepseekV2Config,
        "DeepseekV2ForCausalLM",
        fields=(
            *common(),
            *rope(interleaved=True),
            *LATENT,
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
            *NO_BIASES,
        ),
        tensors=DEEPSEEK,
        has=lambda c: not c.sigmoid,
    ),
    "deepseek_v3": Format(
        models.DeepseekV2Config,
        "DeepseekV3ForCausalLM",
        fields=(
            *common(),
            *rope(interleaved=True, interleave_key="rope_interleave"),
            *LATENT,
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
            fixed("sigmoid", True),
            only("attention_bias", False),
            Field("num_nextn_predict_layers", write=lambda _: 0),
        ),
        tensors=DEEPSEEK,
        has=lambda c: c.sigmoid,
        further_layers="num_nextn_predict_layers",
    ),
    "hunyuan": Format(
        models.HunyuanLargeConfig,
        "HunYuanForCausalLM",
        fields=(
            *common(1e-5),
            *rope(alpha=True),
            KV_HEADS,
            Field("attention_head_dim", "head_dim", None, write=head_dim),
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
            *NO_BIASES,
            only("moe_layer_num_skipped", 0),
        ),
        tensors=model(
            PRE_NORMS,
            attention(keys="key_values"),
            QK_NORMS,
            experts("mlp", "gate.wg"),
            gated("mlp.shared_mlp", "mlp.shared"),
        ),
        block=lambda c, i: ("blocks", i // c.share_factor, "layers", i % c.share_factor),
    ),
    "hunyuan_v1_moe": Format(
        models.HunyuanV1MoEConfig,
        "HunYuanMoEV1ForCausalLM",
        fields=(
            *common(1e-5),
            KV_HEADS,
            # The publisher's code requires a number here: it does not accept null.
            Field("head_dim", "head_dim", None, write=head_dim),
            *rope(alpha=True),
            Field("num_experts", "num_experts", 1),
            Field("moe_topk", "num_experts_per_token", 1),
            only("attention_bias", False),
        ),
        tensors=model(
            PRE_NORMS,
            attention(),
            QK_NORMS,
            experts("mlp", "gate.wg"),
            gated("mlp.shared_mlp", "mlp.shared"),
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
