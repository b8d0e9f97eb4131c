"""Published formats of vision towers: the tables of their config.json and of their tensors."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slam_jax.errors import InputError
from slam_jax.interop.common_fields import read_dtype
from slam_jax.interop.fields import HARMLESS, Field, Fields, Group, only, write_fields
from slam_jax.interop.tensor_tables import HEADS_IN, HEADS_OUT, LINEAR, TABLE, VECTOR
from slam_jax.interop.tensors import Layout, Params, Row, Table, expand
from slam_jax.vision_models.config import ACTIVATIONS, VisionConfig

# Model types of whole models, and that of the tower inside.
WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}

# Fields that change no state of a tower, besides `HARMLESS`.
_HARMLESS = HARMLESS | {
    # Dropout and initial values.
    *("attention_probs_dropout_prob", "drop_path_rate", "dropout", "hidden_dropout_prob"),
    *("initializer_factor", "initializer_range", "layerscale_value"),
    # Heads, which are not read, and the feature maps of backbones.
    *("apply_layernorm", "encoder_stride", "out_features", "out_indices", "pooler_act"),
    *("pooler_output_size", "projection_dim", "reshape_hidden_states", "stage_names"),
    *("tie_word_embeddings", "use_mask_token", "vision_use_head"),
}
# Fields of a whole model beside those of its tower.
_OF_WHOLE = ("logit_scale_init_value", "text_config", "text_config_dict", "vision_config")
_DTYPES = {"dtype", "torch_dtype"}


class VisionFormat(NamedTuple):
    """architecture: the class in the publisher's library; processor: the one for pictures. name: of
    the tower in files with a head, before the names of its tensors."""

    architecture: str
    processor: str
    name: str
    fields: Fields
    tensors: Table


def _fields(patch_size: int, activation: str, norm_epsilon: float, *others: Field) -> Fields:
    """The fields, with the publisher's defaults: folders of SigLIP leave them out."""

    def read_activation(group: Group, key: str) -> str:
        value = group.data.get(key) or activation
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise group.wrong(key, f"one of {', '.join(ACTIVATIONS)}")
        return value

    return (
        Field("image_size", "image_size", 224),
        Field("patch_size", "patch_size", patch_size),
        Field("hidden_size", "embed_dim", 768),
        Field("num_hidden_layers", "num_layers", 12),
        Field("num_attention_heads", "num_heads", 12),
        Field("hidden_act", "activation", read=read_activation),
        Field("layer_norm_eps", "norm_epsilon", norm_epsilon),
        Field("torch_dtype", "param_dtype", read=read_dtype),
        only("num_channels", 3),
        *others,
    )


_MLP_DIM = Field("intermediate_size", "mlp_dim", 3_072)
_QKV_BIAS = Field("qkv_bias", "qkv_bias", True)
_DINO = (
    Field(
        "mlp_ratio",
        "mlp_dim",
        read=lambda g, k: int(g.get("hidden_size", int, 768) * g.get(k, float, 4.0)),
        write=lambda c: c.mlp_dim // c.embed_dim,
    ),
    _QKV_BIAS,
    Field("use_swiglu_ffn", "swiglu", False),
)


def _map(theirs: str, ours: str, pattern: str = LINEAR, bias: str = VECTOR) -> dict[str, Row]:
    """A linear map of theirs. Ours may be two, which are joined along their outputs."""
    kernels, biases = (" ".join(f"{x}.{part}" for x in ours.split()) for part in ("kernel", "bias"))
    return {f"{theirs}.weight": Row(kernels, pattern), f"{theirs}.bias": Row(biases, bias)}


def _norm(theirs: str, ours: str) -> dict[str, Row]:
    parts = (("weight", "scale"), ("bias", "bias"))
    return {f"{theirs}.{t}": Row(f"{ours}.{o}", VECTOR) for t, o in parts}


def _attention(inputs: Sequence[str], out: str) -> dict[str, Row]:
    """inputs: the maps to queries, keys and values."""
    rows = _map(out, "attention.out", HEADS_OUT)
    for theirs, ours in zip(inputs, ("query", "key", "value"), strict=True):
        rows |= _map(theirs, f"attention.{ours}", HEADS_IN, "n h -> (n h)")
    return rows


def _model(top: dict[str, Row], layers: str, *layer: dict[str, Row]) -> Table:
    """layers: the name of the list of layers."""
    return top | {f"{layers}.{{i}}.{k}": row for table in layer for k, row in table.items()}


_PATCHES, _TOKENS = "p q c d -> d c p q", "s d -> 1 s d"
_VIT_TOP = {
    "embeddings.cls_token": Row("class_token", "d -> 1 1 d"),
    "embeddings.register_tokens": Row("registers", _TOKENS),
    "embeddings.position_embeddings": Row("positions", _TOKENS),
    **_map("embeddings.patch_embeddings.projection", "project", _PATCHES),
    **_norm("layernorm", "norm"),
}
_VIT_ATTENTION = _attention(
    [f"attention.attention.{name}" for name in ("query", "key", "value")], "attention.output.dense"
)
_PLAIN_MLP = {**_map("mlp.fc1", "mlp.up"), **_map("mlp.fc2", "mlp.down")}
_GATED_MLP = {
    **_map("mlp.weights_in", "mlp.gate mlp.up"),
    **_map("mlp.weights_out", "mlp.down"),
}
_DINO_TENSORS = _model(
    _VIT_TOP,
    "encoder.layer",
    _norm("norm1", "attention_norm"),
    _VIT_ATTENTION,
    {"layer_scale1.lambda1": Row("attention_scale", VECTOR)},
    _norm("norm2", "mlp_norm"),
    {key: row._replace(when=lambda c, _: not c.swiglu) for key, row in _PLAIN_MLP.items()},
    {key: row._replace(when=lambda c, _: c.swiglu) for key, row in _GATED_MLP.items()},
    {"layer_scale2.lambda1": Row("mlp_scale", VECTOR)},
)
_CLIP_TENSORS = _model(
    {
        "embeddings.class_embedding": Row("class_token", VECTOR),
        "embeddings.position_embedding.weight": Row("positions", TABLE),
        **_map("embeddings.patch_embedding", "project", _PATCHES),
        **_norm("pre_layrnorm", "pre_norm"),
        **_norm("post_layernorm", "norm"),
    },
    "encoder.layers",
    _norm("layer_norm1", "attention_norm"),
    _attention([f"self_attn.{name}_proj" for name in "qkv"], "self_attn.out_proj"),
    _norm("layer_norm2", "mlp_norm"),
    _PLAIN_MLP,
)
VISION_FORMATS = {
    "vit": VisionFormat(
        "ViTModel",
        "ViTImageProcessor",
        "vit",
        _fields(16, "gelu", 1e-12, _MLP_DIM, _QKV_BIAS),
        _model(
            _VIT_TOP,
            "encoder.layer",
            _norm("layernorm_before", "attention_norm"),
            _VIT_ATTENTION,
            _norm("layernorm_after", "mlp_norm"),
            _map("intermediate.dense", "mlp.up"),
            _map("output.dense", "mlp.down"),
        ),
    ),
    "dinov2": VisionFormat(
        "Dinov2Model",
        "BitImageProcessor",
        "dinov2",
        _fields(14, "gelu", 1e-6, *_DINO, Field("use_mask_token", write=lambda _: False)),
        _DINO_TENSORS,
    ),
    "dinov2_with_registers": VisionFormat(
        "Dinov2WithRegistersModel",
        "BitImageProcessor",
        "dinov2_with_registers",
        _fields(16, "gelu", 1e-6, *_DINO, Field("num_register_tokens", "num_registers", 4)),
        _DINO_TENSORS,
    ),
    "clip_vision_model": VisionFormat(
        "CLIPVisionModel",
        "CLIPImageProcessor",
        "vision_model",
        _fields(32, "quick_gelu", 1e-5, _MLP_DIM),
        _CLIP_TENSORS,
    ),
    "siglip_vision_model": VisionFormat(
        "SiglipVisionModel",
        "SiglipImageProcessor",
        "vision_model",
        _fields(
            16, "gelu_pytorch_tanh", 1e-6, _MLP_DIM, Field("vision_use_head", write=lambda _: False)
        ),
        _CLIP_TENSORS,
    ),
}


def read_vision_config(data: Any) -> VisionConfig:
    group = group_of(data)
    kind = data.get("model_type")
    if isinstance(kind, str) and kind in WHOLE:
        group, kind = _vision_group(group), WHOLE[kind]
    if not isinstance(kind, str) or kind not in VISION_FORMATS:
        raise group.wrong("model_type", f"one of {', '.join([*VISION_FORMATS, *WHOLE])}")
    fields = (*VISION_FORMATS[kind].fields, only("pruned_heads", {}))
    require_known(group, {field.key for field in fields} | _HARMLESS | _DTYPES)
    return VisionConfig(model_type=kind, **group.read(fields))


def _vision_group(whole: Group) -> Group:
    """The fields of the tower in a whole model, which may give the dtype of both."""
    kind, key = whole.data["model_type"], "vision_config"
    old = "vision_config_dict" if kind == "clip" else key
    require_known(whole, {*_HARMLESS, *_OF_WHOLE, *_DTYPES, old})
    if whole.data.get(old) is not None:  # the publisher's code prefers it
        key = old
    inner = whole.data.get(key)
    if not isinstance(inner, Mapping | None):
        raise whole.wrong(key, "a group of fields")
    given = {field: value for field, value in (inner or {}).items() if value is not None}
    dtypes = {} if given.keys() & _DTYPES else {k: whole.data.get(k) for k in _DTYPES}
    group = Group({"model_type": WHOLE[kind], **dtypes, **given}, f"{key}.")
    if group.data["model_type"] != WHOLE[kind]:
        raise group.wrong("model_type", WHOLE[kind])
    return group


def write_vision_config(config: VisionConfig) -> dict[str, Any]:
    form = VISION_FORMATS[config.model_type]
    data = {"architectures": [form.architecture], "model_type": config.model_type}
    data |= write_fields(form.fields, config)
    again = read_vision_config(data)
    for field in set(vars(config)) - {"dtype", "remat", "scan_layers"}:
        value, found = getattr(config, field), getattr(again, field)
        if value != found:
            problem = f"{config.model_type} cannot express it, and would read {found}"
            raise InputError(f"{field} is {value}; {problem}")
    return data


def vision_layout(config: VisionConfig, shapes: Params, prefix: str = "") -> Layout:
    table = {prefix + key: row for key, row in VISION_FORMATS[config.model_type].tensors.items()}
    return expand(table, config, shapes, [("blocks", i) for i in range(config.num_layers)])


def require_known(group: Group, known: set[str]) -> None:
    for key in sorted(group.data.keys() - known):
        if group.data[key] is not None:
            raise group.wrong(key, "nothing: it is not understood, and may change the outcome")


def group_of(data: Any, file: str = "config.json") -> Group:
    """The fields of a JSON file, which has to be a group of them."""
    if not isinstance(data, Mapping):
        raise InputError(f"{file}: expected a group of fields")
    return Group(data, file=file)
