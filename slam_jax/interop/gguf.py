"""Reads GGUF files of the llama family, as llama.cpp writes them, in the terms of the hub.

The layout: llama.cpp, conversion/{base,llama,qwen}.py and src/models/{llama,qwen2,qwen3}.cpp, where
Mistral models have the architecture llama. Only values are read; nothing in a file is executed.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slam_jax.errors import InputError, first_line
from slam_jax.interop.gguf_config import ARCHITECTURES, read_gguf_config
from slam_jax.interop.gguf_header import Block, Header, library, read_header, shown
from slam_jax.interop.gguf_tokenizer import (
    read_generation_config,
    read_tokenizer_config,
    read_tokenizer_json,
)
from slam_jax.interop.weights import Stored

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(0|[1-9]\d{0,3})\.)?([a-z_]+)\.(weight|bias)", re.ASCII)
# It becomes a field of the configuration.
_FREQUENCIES = "rope_freqs.weight"

# `gguf.GGMLQuantizationType` of what is stored as numbers.
_PLAIN: dict[int, tuple[str, Any]] = {
    0: ("F32", np.float32),
    1: ("F16", np.float16),
    30: ("BF16", ml_dtypes.bfloat16),
}


class GGUF:
    """A GGUF file, as if it were a folder of the hub.

    name: the file. config: what config.json would have. stored: its tensors by the hub's names.

    Raises InputError for a file that is not a GGUF file of the llama family, and for a tensor or a
    value that would change the outcome and is not built.
    """

    name: Path
    config: dict[str, Any]
    stored: Mapping[str, Stored]

    def __init__(self, path: str | Path):
        library()
        self.name = Path(path)
        self._header = read_header(self.name)
        self._blocks = _by_published_name(self._header)
        self.stored = {
            key: Stored(self.name, block.shape, _PLAIN.get(block.kind, _PLAIN[0])[0])
            for key, block in self._blocks.items()
        }
        factors = self._header.tensors.get(_FREQUENCIES)
        self.config = read_gguf_config(
            self._header, self.stored, None if factors is None else self._dequantise(factors)
        )

    def read(self, key: str) -> np.ndarray:
        """A tensor in the shape and dtype that `stored` says, dequantised, with the rows of queries
        and keys in the hub's order.

        Raises InputError where the file has been cut since it was opened.
        """
        values = self._dequantise(self._blocks[key])
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        part = key.split(".")[-2]
        if part in heads and ARCHITECTURES[self.config["model_type"]].is_permuted:
            return _unpermute(values, self.config[heads[part]])
        return values

    @functools.cached_property
    def tokenizer_json(self) -> str | None:
        """The text of the tokenizer.json; None where the file has no tokenizer.

        Raises InputError, naming it, for a kind of tokenizer that is not built.
        """
        return read_tokenizer_json(self._header)

    @functools.cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """What tokenizer_config.json would have: the texts of special tokens, whether a text begins
        and ends with them, and the chat template. Raises InputError for an id that is no token."""
        return read_tokenizer_config(self._header)

    @functools.cached_property
    def generation_config(self) -> dict[str, Any]:
        """What generation_config.json would have: the ids that begin and end a text."""
        return read_generation_config(self._header)

    def _dequantise(self, block: Block) -> np.ndarray:
        try:
            with self.name.open("rb") as stream:
                stream.seek(block.offset)
                data = stream.read(block.num_bytes)
        except OSError as error:
            raise InputError(f"{self.name}: {first_line(error)}; expected a GGUF file") from None
        if len(data) != block.num_bytes:
            raise InputError(f"{self.name}: it was cut while it was read")
        if block.kind in _PLAIN:
            dtype = np.dtype(_PLAIN[block.kind][1])
            return np.frombuffer(data, dtype).reshape(block.shape)
        gguf = library()
        rows = np.frombuffer(data, np.uint8).reshape(*block.shape[:-1], -1)
        with np.errstate(all="ignore"):  # a damaged scale may be infinite
            return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(block.kind))


def _by_published_name(header: Header) -> dict[str, Block]:
    blocks = {}
    for name, block in header.tensors.items():
        if name == _FREQUENCIES:
            continue
        match = _NAME.fullmatch(name)
        layer, part, kind = match.groups() if match else (None, "", "")
        table = _TOP if layer is None else _LAYER
        if part not in table:
            problem = f"the tensor {shown(name)} is not built"
            raise InputError(f"{header.file}: {problem}; expected those of a model of llama's form")
        prefix = "" if layer is None else f"model.layers.{layer}."
        blocks[f"{prefix}{table[part]}.{kind}"] = block
    return blocks


def _unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of queries or keys in the hub's order: in each head first all first features of the
    rotated pairs, then all second ones. llama.cpp has each pair side by side."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
