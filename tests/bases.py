"""Base weights for tests: the MLPs and attention of a decoder in a file, and a language model."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_hub_tokenizer import TEMPLATE, byte_level

from slam_jax.interop import save_pretrained
from slam_jax.language_models import make_config, make_model
from slam_jax.slam_v3 import SlamV3, SlamV3Config
from slam_jax.training import split_model
from slam_jax.training.base import Base, BaseRecord, sha256_of
from slam_jax.training.checkpoint.trees import by_name, from_names

NAME, FILE = "model.decoder.pretrained", "weights.safetensors"
PROVIDED = r"layers/\d/(mlp|attention)/.*kernel"
PREFIX = ("decoder",)


def write_base(folder: Path, model: SlamV3Config) -> None:
    """A file with the MLP and attention of every decoder layer in float16."""
    shapes = split_model(nnx.eval_shape(lambda: SlamV3(model, rngs=nnx.Rngs(0))))[1]["decoder"]
    rng = np.random.default_rng(7)
    arrays = {
        name: rng.normal(0, 0.1, x.shape).astype(np.float16)
        for name, x in by_name(shapes).items()
        if re.fullmatch(PROVIDED, name)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / FILE)


def base_in(folder: Path, known: Any = None) -> Base:
    if known is None:
        record = BaseRecord(
            NAME,
            str(folder),
            sha256_of(folder, [FILE]),
            PREFIX,
        )
    else:
        record = known[NAME]
    arrays = load_file(Path(record.path) / FILE)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    return Base(record, shapes, lambda like: from_names(arrays, like))


def write_language_model(folder: Path, unused: int = 0) -> None:
    """A folder of the hub with a tiny model and its tokenizer; unused: rows without a token."""
    tokenizer = byte_level(bos=False)
    config = make_config("standard", "tiny", vocab_size=tokenizer.get_vocab_size() + unused)
    save_pretrained(make_model(config, rngs=nnx.Rngs(3)), folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    fields = {"bos_token": "<s>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
