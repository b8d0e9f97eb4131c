"""Folders of published weights with anything in them load, or end in one clear line, and soon."""

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import reset_peak_memory
from test_fuzz import answered

from slam_jax.interop import load_pretrained, save_pretrained
from slam_jax.language_models import make_config, make_model
from slam_jax.rocket.machine import peak_memory

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = ("config.json", WEIGHTS, INDEX)
MOST_MEMORY = 2**30  # in bytes, more than before all cases

Rng = np.random.Generator

NUMBERS = [0, 1, -1, 2, 3, 7, 511, 512, 2**20, 2**31, 2**40, 2**63, 10**30, 0.5, 1e300, 1e-300]
VALUES = [*NUMBERS, None, True, False, "", "x", "a" * 5_000, "\0", [], {}, [1, 2], {"a": 1}, [[]]]
VALUES += [float("nan"), float("inf"), "float32", "bf16", "auto", "../x", "/dev/zero", 10**400]
NEW_FIELDS = {
    "quantization_config": [
        {"quant_method": "fp8", "weight_block_size": [2, 3]},
        {"quant_method": "fp8", "weight_block_size": [10**30, 1]},
        {"quant_method": "fp8", "weight_block_size": None},
        {"quant_method": ["fp8"]},
    ],
    "rope_parameters": [{"rope_type": "llama3"}, {"rope_type": ["x"]}, {"rope_theta": 1e300}],
    "tie_word_embeddings": [True],
    "num_nextn_predict_layers": [1, 512, 10**9],
    "model_type": ["llama", "mistral", "qwen2", "qwen3", "jamba", "deepseek_v3", "hunyuan", ["x"]],
}


def pick(rng: Rng, values: Any) -> Any:
    values = list(values)
    return values[int(rng.integers(len(values)))]


def put(path: Path, content: bytes | str) -> None:
    """A new file in place of what is there. It never writes through a link."""
    path.unlink(missing_ok=True)
    with open(path, "xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def spoil_bytes(rng: Rng, content: bytes) -> bytes:
    """Some bytes changed, cut, repeated or put in."""
    data = bytearray(content or b"\0")
    for _ in range(int(rng.integers(1, 4))):
        at, count = int(rng.integers(len(data))), int(rng.integers(1, 9))
        how = int(rng.integers(4))
        if how == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            del data[at : at + count]
        elif how == 2:
            data[at:at] = data[at : at + count] * int(rng.integers(1, 9))
        else:
            data[at : at + count] = bytes(rng.integers(0, 256, count, np.uint8))
        data = data or bytearray(b"\0")
    return bytes(data)


def spoil_value(rng: Rng, value: Any) -> Any:
    """One value anywhere in a tree of JSON replaced, or left out."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        key = pick(rng, value if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.1:
            del value[key]
        else:
            value[key] = spoil_value(rng, value[key])
        return value
    return pick(rng, VALUES)


def spoil_config(rng: Rng, folder: Path) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    for _ in range(int(rng.integers(1, 4))):
        if rng.random() < 0.3:
            key = pick(rng, NEW_FIELDS)
            data[key] = pick(rng, NEW_FIELDS[key])
        else:
            data = spoil_value(rng, data)
    put(path, json.dumps(data))


def read_header(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / WEIGHTS).read_bytes()
    first = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:first]), content[first:]


def write_header(folder: Path, tensors: Any, data: bytes, length: int | None = None) -> None:
    text = json.dumps(tensors).encode()
    first = struct.pack("<Q", len(text) if length is None else length)
    put(folder / WEIGHTS, first + text + data)


def spoil_header(rng: Rng, folder: Path) -> None:
    tensors, data = read_header(folder)
    length = pick(rng, [0, 1, 2**24, 2**32, 2**63, 2**64 - 1]) if rng.random() < 0.1 else None
    for _ in range(int(rng.integers(1, 3))):
        tensors = spoil_value(rng, tensors)
    write_header(folder, tensors, data, length)


def respell_header(rng: Rng, folder: Path) -> None:
    """Headers that are valid: tensors of another dtype, shape or name, as long as before."""
    tensors, data = read_header(folder)
    for key in [pick(rng, tensors) for _ in range(int(rng.integers(1, 4)))]:
        entry = tensors.get(key, {})
        if "dtype" not in entry:
            continue
        how = int(rng.integers(3))
        if how == 0 and len(entry["shape"]) == 2:
            entry["shape"] = entry["shape"][::-1]
        elif how == 1 and entry["shape"]:
            entry["dtype"] = pick(rng, ["F16", "BF16", "I16", "F8_E4M3"])
            entry["shape"][-1] *= 4 if entry["dtype"] == "F8_E4M3" else 2
        else:
            name = pick(rng, ["lm_head.weight", f"{key}_scale_inv", "a\nb", "ü" * 999, "", key])
            tensors[name] = tensors.pop(key)
    write_header(folder, tensors, data)


def spoil_index(rng: Rng, folder: Path) -> None:
    tensors, _ = read_header(folder)
    index = {"weight_map": dict.fromkeys(tensors, WEIGHTS)}
    for _ in range(int(rng.integers(3))):
        index = spoil_value(rng, index)
    put(folder / INDEX, json.dumps(index))


def spoil_file(rng: Rng, folder: Path) -> None:
    path = folder / pick(rng, NAMES)
    content = path.read_bytes() if path.exists() else b"{}"
    put(path, spoil_bytes(rng, content))


def spoil_first_bytes(rng: Rng, folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    put(folder / WEIGHTS, spoil_bytes(rng, content[:1_500]) + content[1_500:])


def nest(rng: Rng, folder: Path) -> None:
    path = folder / pick(rng, NAMES)
    count = pick(rng, [50, 5_000, 400_000])
    put(path, pick(rng, ["[" * count, '{"a":' * count, "[" * count + "]" * count]))


def replace_file(rng: Rng, folder: Path) -> None:
    """Something that is no file in place of one, or a link, or one file for another."""
    path = folder / pick(rng, (*NAMES, "model-2.safetensors", "other.safetensors"))
    path.unlink(missing_ok=True)
    targets = ["nowhere", "/dev/zero", "/dev/null", path.name, ".", "/proc/version", "config.json"]
    links = [lambda p, to=to: p.symlink_to(to) for to in targets]
    makes: list[Callable[[Path], Any]] = [os.mkfifo, os.mkdir, lambda p: put(p, b""), *links]
    pick(rng, makes)(path)


def spoil_numbers(rng: Rng, folder: Path) -> None:
    tensors, data = read_header(folder)
    at = int(rng.integers(len(data) // 4)) * 4
    number = np.float32(pick(rng, [np.nan, np.inf, 3e38, 0])).tobytes()
    write_header(folder, tensors, data[:at] + number + data[at + 4 :])


SPOILS = (
    *(spoil_bytes_of for spoil_bytes_of in (spoil_file, spoil_first_bytes, spoil_numbers)),
    *(spoil_config, spoil_config, spoil_header, respell_header, spoil_index, nest, replace_file),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    sizes = dict(vocab_size=16, embed_dim=8, mlp_dim=8, num_layers=1, num_heads=2)
    config = make_config("standard", "tiny", **sizes)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_pretrained(make_model(config, rngs=nnx.Rngs(0)), folder)
    return folder


def run(tiny: Path, to: Path, cases: int) -> int:
    """How many of the cases loaded."""
    loaded, before = 0, reset_peak_memory()
    for case in range(cases):
        rng = np.random.default_rng(case)
        folder = Path(shutil.copytree(tiny, to / str(case)))
        spoils = [pick(rng, SPOILS) for _ in range(int(rng.integers(1, 3)))]
        for spoil in spoils:
            # A second one finds what the first left, and must not read a pipe or a device.
            left = [folder / name for name in NAMES if (folder / name).exists()]
            if all(path.is_file() for path in left):
                with contextlib.suppress(Exception):
                    spoil(rng, folder)
        try:
            with answered():
                model, _ = load_pretrained(folder, check_finite=case % 2 == 0)
                jax.block_until_ready(nnx.state(model))
                loaded += 1
        except BaseException as error:
            error.add_note(f"case {case}: {[spoil.__name__ for spoil in spoils]}")
            raise
        shutil.rmtree(folder)
    grown = peak_memory() - before
    assert grown < MOST_MEMORY, grown
    return loaded


def test_a_folder_of_anything_is_answered(tiny, tmp_path):
    assert 5 < run(tiny, tmp_path, 100) < 95


@pytest.mark.slow
def test_two_thousand_folders_of_anything_are_answered(tiny, tmp_path):
    assert 100 < run(tiny, tmp_path, 2_000) < 1_900
