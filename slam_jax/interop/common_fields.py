"""Fields of config.json that several published language models have."""

from typing import Any

from slam_jax.interop.fields import Field, Fields, Group, context_of, only

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


def read_rank(group: Group, key: str) -> int | None:
    """A number, or "auto"."""
    return None if group.data.get(key, "auto") == "auto" else group.get(key, int)


def _read_q_rank(group: Group, key: str) -> int | None:
    """Null is full rank; an absent field is the publisher's default."""
    return group.get(key, int, None) if key in group.data else 1_536


def read_choices(group: Group, key: str) -> int:
    """With one expert there is no choice, whatever the field says."""
    return 1 if group.get("num_experts", int, 16) == 1 else group.get(key, int, 2)


def head_dim(config: Any) -> int:
    """The width of a head, also where the configuration leaves it open."""
    return config.head_dim or config.embed_dim // config.num_heads


def common(norm_epsilon: float = 1e-6) -> Fields:
    """The fields of every type. norm_epsilon: the publisher's default."""
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


KV_HEADS = Field(
    "num_key_value_heads", "num_kv_heads", None, write=lambda c: c.num_kv_heads or c.num_heads
)
NO_BIASES = (only("attention_bias", False), only("mlp_bias", False))
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


FULL_LAYERS = Field("layer_types", read=_all_full, write=lambda _: ...)
WINDOWS = (
    Field("sliding_window", "window", None, _read_window),
    Field("layer_types", "window_layers", None, _read_window_layers, _layer_types),
)


def fixed(attribute: str, value: Any) -> Field:
    """An attribute that a type always has, and no field for."""
    return Field(f"={attribute}", attribute, read=lambda *_: value, write=lambda _: ...)


def biases(config: Any) -> tuple[bool, bool, bool]:
    """Whether queries, keys and values, the output of attention, and the MLP have biases."""
    return config.qkv_bias, config.out_bias, config.mlp_bias


LATENT = (
    Field("num_key_value_heads", write=lambda c: c.num_heads),
    Field("kv_lora_rank", "kv_lora_rank", 512),
    Field("q_lora_rank", "q_lora_rank", None, _read_q_rank),
    Field("qk_nope_head_dim", "qk_nope_head_dim", 128),
    Field("qk_rope_head_dim", "qk_rope_head_dim", 64),
    Field("qk_head_dim", write=lambda c: c.qk_nope_head_dim + c.qk_rope_head_dim),
    Field("head_dim", write=lambda c: c.qk_rope_head_dim),
    Field("v_head_dim", "v_head_dim", 128),
)
