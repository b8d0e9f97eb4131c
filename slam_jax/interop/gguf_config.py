"""The configuration of a GGUF file of the llama family, in the fields of the hub's config.json."""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from slam_jax.errors import InputError, is_whole
from slam_jax.interop.gguf_header import Header


class Architecture(NamedTuple):
    """published: the class in the publisher's library. is_permuted: whether llama.cpp stores the
    rows of queries and keys in another order than the hub. has_bias: whether the type has a field
    for biases; llama has one more for those of the MLP."""

    published: str
    is_permuted: bool
    has_bias: bool


# By `general.architecture`, which is the model_type, too.
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", is_permuted=True, has_bias=True),
    "qwen2": Architecture("Qwen2ForCausalLM", is_permuted=False, has_bias=False),
    "qwen3": Architecture("Qwen3ForCausalLM", is_permuted=False, has_bias=True),
}

_READ = {
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "attention.sliding_window"),
    *("rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
}
# They change nothing: where the order of the rows comes from, and how the scaling was trained.
_HARMLESS = {"tensor_data_layout", "rope.scaling.finetuned"}
# With these values they change nothing. Of any other key 0 is such a value.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
}
_LARGEST = 1 << 24


def read_gguf_config(
    header: Header, names: Collection[str], factors: np.ndarray | None
) -> dict[str, Any]:
    """The fields of config.json.

    names: the tensors of the file, as the hub calls them. factors: what the file divides the rotary
    frequencies by, one for each pair of features.

    Raises InputError, naming it, for an architecture or a value that is not built.
    """
    kind = header.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise header.wrong("general.architecture", f"one of {', '.join(ARCHITECTURES)}")
    values = _Values(header, kind)
    values.check()
    heads = values.size("attention.head_count")
    width, default = values.size("embedding_length"), None
    if width % heads == 0:
        default = width // heads
    head_dim = values.size("attention.key_length", default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.size(key, head_dim) != head_dim:
            raise values.wrong(key, f"{head_dim}, as many features as a head has")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind].published],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": _vocab_size(values),
        "hidden_size": width,
        "intermediate_size": values.size("feed_forward_length"),
        "num_hidden_layers": values.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.size("attention.head_count_kv", heads),
        "max_position_embeddings": values.size("context_length"),
        "rms_norm_eps": values.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(values, head_dim, factors),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "dtype": "float32",
    }
    if kind != "qwen2":
        config["head_dim"] = head_dim
    elif head_dim != default:
        raise values.wrong("attention.key_length", f"{default}: qwen2 has no other")
    if ARCHITECTURES[kind].has_bias:
        config["attention_bias"] = any(name.endswith("q_proj.bias") for name in names)
    if kind == "llama":
        config["mlp_bias"] = any(name.endswith("up_proj.bias") for name in names)
    _check_permutation(values, config)
    return config


class _Values:
    """The metadata of an architecture."""

    def __init__(self, header: Header, kind: str):
        self.header, self.prefix = header, f"{kind}."
        self.values = {
            key.removeprefix(self.prefix): value
            for key, value in header.metadata.items()
            if key.startswith(self.prefix)
        }

    def wrong(self, key: str, expected: str) -> InputError:
        return self.header.wrong(f"{self.prefix}{key}", expected)

    def check(self) -> None:
        """Raises InputError for what would change the outcome and is not built."""
        general = {"general.type": "model", "general.quantization_version": 2, "split.count": 1}
        for key, only in general.items():
            value = self.header.metadata.get(key, only)
            if isinstance(value, (list, np.ndarray)) or value not in (only, 0):
                hint = "; join the files with llama-gguf-split --merge" if "split" in key else ""
                raise self.header.wrong(key, f"{only}, which is all that is built{hint}")
        for key, value in self.values.items():
            if isinstance(value, (list, np.ndarray)):
                is_neutral = not any(value) if isinstance(value, list) else not value.any()
            else:
                is_neutral = value in _NEUTRAL.get(key, (0, "", "none"))
            if key not in _READ | _HARMLESS and not is_neutral:
                raise self.wrong(key, "nothing: it is not built")
        window = self.size("attention.sliding_window", 0, least=0)
        if 0 < window < self.size("context_length"):
            raise self.wrong("attention.sliding_window", "nothing: it is not built")

    def get(self, key: str, default: Any = None) -> Any:
        """A list with one value for each layer counts as one of them where all are equal."""
        value = self.values.get(key)
        if isinstance(value, (list, np.ndarray)):
            if not len(value) or np.any(np.asarray(value) != value[0]):
                raise self.wrong(key, "one value, or the same for each layer")
            value = np.asarray(value)[0].item()
        return default if value is None else value

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(key, default)
        if not is_whole(value) or not least <= value <= _LARGEST:
            raise self.wrong(key, f"a whole number from {least} to {_LARGEST:,}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e12:
            raise self.wrong(key, "a number above 0, up to 1e12")
        return float(value)


def _vocab_size(values: _Values) -> int:
    tokens = values.header.metadata.get("tokenizer.ggml.tokens")
    embedding = values.header.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{values.header.file}: no token_embd.weight; expected a whole model")
    count = values.size("vocab_size", embedding.shape[0])
    if isinstance(tokens, list) and len(tokens) > count:
        raise InputError(
            f"{values.header.file}: it has {len(tokens):,} tokens; expected at most {count:,}"
        )
    return count


def _check_permutation(values: _Values, config: dict[str, Any]) -> None:
    """Checks the rows of queries and keys, which are put into another order before the shapes of
    the model are known."""
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if head_dim % 2:
        raise values.wrong("attention.key_length", "an even number")
    for part, heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
        rows = config[heads] * head_dim
        for name, block in values.header.tensors.items():
            if f".{part}." in name and block.shape[0] != rows:
                shape = f"{name} is {list(block.shape)}"
                raise InputError(f"{values.header.file}: {shape}; expected {rows:,} rows")


def _rope(values: _Values, head_dim: int, factors: np.ndarray | None) -> dict[str, Any]:
    """The rotary positions. llama.cpp: without a type a factor is linear."""
    kind, base = values.get("rope.scaling.type", "linear"), values.number("rope.freq_base", 1e4)
    scale = values.get("rope.scaling.factor", 0) or values.get("rope.scale_linear", 0)
    scale = values.number("rope.scaling.factor", scale or 1.0) if kind != "none" else 1.0
    length = values.size("context_length")
    original = values.size("rope.scaling.original_context_length", length)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if kind not in ("none", "linear", "yarn"):
        raise values.wrong("rope.scaling.type", "none, linear or yarn, which are all that is built")
    if factors is not None:
        if scale != 1:
            raise values.wrong("rope.scaling.factor", "1 beside the tensor rope_freqs.weight")
        return rope | _factors(values, head_dim, base, factors)
    if scale == 1:
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": scale}
    return rope | {
        "rope_type": "yarn",
        "factor": scale,
        "original_max_position_embeddings": original,
        "beta_fast": values.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": values.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _factors(values: _Values, head_dim: int, base: float, factors: np.ndarray) -> dict[str, Any]:
    """The scaling that gives these factors: that of Llama 3, else LongRoPE, which can have any."""
    found = factors.astype(np.float64)
    if found.shape != (head_dim // 2,) or not ((found > 0) & (found <= 1e12)).all():
        file = values.header.file
        raise InputError(f"{file}: rope_freqs.weight is not {head_dim // 2} numbers up to 1e12")
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    factor = round(float(found.max()), 4)
    for exponent in range(4, 22):  # Published: 1, 4 and an original context of 8,192.
        ramp = np.clip(((1 << exponent) / wavelengths - 1.0) / (4.0 - 1.0), 0, 1)
        if np.allclose(found, 1 / ((1 - ramp) / factor + ramp), rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1 << exponent,
            }
    each = [float(x) for x in factors]
    return {
        "rope_type": "longrope",
        "short_factor": each,
        "long_factor": each,
        "attention_factor": 1.0,
        "original_max_position_embeddings": values.size("context_length"),
    }
