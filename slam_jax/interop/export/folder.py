"""Writes a trained model as a folder that runs with jax and numpy alone."""

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

from slam_jax.data.hub_tokenizer import HubTokenizer
from slam_jax.errors import InputError, is_whole, shorten, writing
from slam_jax.generation.decode import LEAST_LENGTH
from slam_jax.interop.export.programs import (
    PLATFORMS,
    Exportable,
    Sizes,
    exportable,
    groups_of,
    lower,
)
from slam_jax.runtime.files import sha256
from slam_jax.version import __version__

LOADER = Path(__file__).with_name("run.py")
_INPUTS = ("text", "image", "aux")
_USUAL_LENGTH, _USUAL_TEXT = 1_024, 128
_MOST_BATCH = 1_024
_PART_BYTES = 2_000_000_000  # of one file of weights
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def export_model(
    loaded: Any,
    out: str | Path,
    *,
    platforms: Sequence[str] = ("cpu", "cuda"),
    batch: int = 1,
    max_length: int | None = None,
    prompt_lengths: Sequence[int] | None = None,
    inputs: Sequence[str] = _INPUTS,
    text_length: int = _USUAL_TEXT,
) -> dict[str, Any]:
    """Writes a model of `slam_jax.load` as a new folder, and returns its manifest.

    The folder has programs (StableHLO of `jax.export`), weights (.npz), the tokenizer, a manifest
    and `run.py`, which loads them. The programs compute in the dtype that the model has here.

    platforms: some of "cpu", "cuda", "rocm" and "tpu". batch: rows of every call. max_length:
      tokens of a row, prompt and answer; None = the context, at most 1,024. prompt_lengths: a
      prompt is padded to the next of them; None = 16, 32, .. up to max_length. inputs: what a SLAM
      v3 may be asked about; fewer make `encode` faster. text_length: tokens of a text at most.

    Raises:
      InputError: a value cannot be used, or the folder exists.
      WriteError: the folder cannot be written; nothing is left behind.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: it exists already; give the name of a new folder")
    _flatbuffers()
    groups = groups_of(_checked_platforms(platforms))
    sizes = _sizes(loaded, batch, max_length, prompt_lengths, inputs, text_length)
    model = exportable(loaded, sizes)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            manifest = _write(temporary, loaded, model, sizes, groups)
            temporary.chmod(0o755)
            os.rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _write(
    folder: Path, loaded: Any, model: Exportable, sizes: Sizes, groups: Mapping[str, Any]
) -> dict[str, Any]:
    programs: dict[str, dict[str, str]] = {}
    for group, platforms in groups.items():
        (folder / "programs" / group).mkdir(parents=True)
        programs[group] = {}
        for name, (function, arguments) in model.functions.items():
            programs[group][name] = file = f"programs/{group}/{name}.bin"
            data = lower(function, arguments, platforms, cpu=group == "cpu")
            (folder / file).write_bytes(data)
    weights = _write_weights(folder, model.weights)
    (folder / "tokenizer").mkdir()
    tokenizer = loaded.tokenizer
    is_hub = isinstance(tokenizer, HubTokenizer)
    texts = tokenizer.to_files() if is_hub else {"tokenizer.json": tokenizer.to_json()}
    for name, text in texts.items():
        (folder / "tokenizer" / name).write_text(text, encoding="utf-8")
    shutil.copyfile(LOADER, folder / LOADER.name)
    _copy_flatbuffers(folder / "packages")
    manifest = {
        "format": "slam_jax export 1",
        "made_with": {
            "slam_jax": __version__,
            "jax": jax.__version__,
            "calling_convention": jax.export.maximum_supported_calling_convention_version,
        },
        "model": type(loaded.model).__name__,
        "platforms": {each: group for group, names in groups.items() for each in names},
        **_about(loaded, sizes, is_hub),
        "inputs": [{"name": name, **_shape(x)} for name, x in sizes.inputs.items()],
        "memory": [_shape(x) for x in model.memory],
        "cache": [_shape(x) for x in model.cache],
        "programs": programs,
        "weights": weights,
        "files": {
            path.relative_to(folder).as_posix(): sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
    (folder / "manifest.json").write_text(_in_lines(manifest), encoding="utf-8")
    return manifest


def _copy_flatbuffers(folder: Path) -> None:
    """Puts flatbuffers beside the loader: `jax.export` reads with it, and jax does not require it.
    It is Python alone, and has the same license as this package."""
    source = Path(_flatbuffers().__file__).parent
    shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))


def _flatbuffers() -> Any:
    try:
        return importlib.import_module("flatbuffers")
    except ImportError:
        raise InputError(
            "export needs flatbuffers; install it with: pip install 'slam_jax[export]'"
        ) from None


def _about(loaded: Any, sizes: Sizes, is_hub: bool) -> dict[str, Any]:
    """What a caller needs to know of the model and of its tokenizer."""
    tokenizer, aux_format = loaded.tokenizer, loaded.aux_format
    generation = getattr(tokenizer, "generation", {})
    sampling = {name: generation[name] for name in _OF_SAMPLING if name in generation}
    own_rule = is_hub and tokenizer.adds_bos is None
    adds_bos = not is_hub or (tokenizer.adds_bos and tokenizer.bos_id is not None)
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    about: dict[str, Any] = {
        "batch": sizes.batch,
        "max_length": sizes.max_length,
        "prompt_lengths": sorted(sizes.prompt_lengths),
        "vocab_size": loaded.model.config.vocab_size,
        "end_ids": list(tokenizer.end_ids),
        "pad_id": tokenizer.pad_id,
        # How a prompt becomes token ids.
        "prompt": {
            "adds_special": own_rule,
            "first": [tokenizer.bos_id] if adds_bos else [],
            "literal": not is_hub,
            "eos_id": tokenizer.eos_id,
            "if_empty": next(each for each in ids if each is not None),
        },
        "sampling": {"max_new_tokens": getattr(loaded, "max_new_tokens", 32), **sampling},
    }
    if "image" in sizes.inputs:
        about["resize"] = getattr(loaded, "resize", None)
    if "aux" in sizes.inputs and aux_format is not None:
        about["aux"] = aux_format.to_json()
    return about


def _write_weights(folder: Path, weights: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Writes weights-0.npz and so on, and returns where each weight is. NumPy has no bfloat16:
    arrays of such dtypes are stored as whole numbers of their bits."""
    found, part, size = [], {}, 0
    for name, value in weights.items():
        array = np.asarray(value)
        stored = array.view(f"u{array.itemsize}") if array.dtype.kind == "V" else array
        if part and size + stored.nbytes > _PART_BYTES:
            np.savez(folder / found[-1]["file"], **part)
            part, size = {}, 0
        number = int(found[-1]["file"][8:-4]) + (not part) if found else 0
        part[name], size = stored, size + stored.nbytes
        found.append({"name": name, **_shape(array), "file": f"weights-{number}.npz"})
    np.savez(folder / found[-1]["file"], **part)
    return found


def _sizes(
    loaded: Any,
    batch: Any,
    max_length: Any,
    prompt_lengths: Sequence[Any] | None,
    inputs: Sequence[str],
    text_length: Any,
) -> Sizes:
    """The shapes to export. Raises InputError, naming the argument."""
    context = loaded.model.config.context_length
    longest = min(context, _USUAL_LENGTH) if max_length is None else max_length
    _check_count("batch", batch, _MOST_BATCH)
    _check_count("max_length", longest, context)
    if prompt_lengths is None:
        buckets = (LEAST_LENGTH << i for i in range(32))
        prompt_lengths = [*(each for each in buckets if each < longest), longest]
    if not prompt_lengths:
        raise InputError("prompt_lengths: give at least one")
    for length in prompt_lengths:
        _check_count("prompt_lengths", length, longest)
    if not hasattr(loaded.model, "encode"):
        return Sizes(batch, longest, tuple(set(prompt_lengths)), {})
    if not inputs or not set(inputs) <= set(_INPUTS):
        raise InputError(f"inputs: {shorten(repr(inputs), 60)}; expected some of text, image, aux")
    _check_count("text_length", text_length, context)
    config = loaded.model.config
    pictures = (config.image.max_images,) if config.image.max_images > 1 else ()
    pixels = (config.image.size, config.image.size, 3)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
        "text": ((batch, text_length), (batch, text_length), np.int32),
        "image": ((batch, *pictures, *pixels), (batch, *pictures), np.uint8),
        "aux": ((batch, config.max_aux, config.aux_dim), (batch, config.max_aux), np.float32),
    }
    specs = {}
    for name in (each for each in _INPUTS if each in inputs):
        shape, mask, dtype = shapes[name]
        specs[name] = jax.ShapeDtypeStruct(shape, dtype)
        specs[f"{name}_mask"] = jax.ShapeDtypeStruct(mask, np.bool_)
    return Sizes(batch, longest, tuple(set(prompt_lengths)), specs)


def _checked_platforms(platforms: Sequence[str]) -> list[str]:
    given = list(dict.fromkeys(platforms))
    if not given or not set(given) <= set(PLATFORMS):
        expected = f"some of {', '.join(PLATFORMS)}"
        raise InputError(f"platforms: {shorten(', '.join(given), 60)!r}; expected {expected}")
    return given


def _check_count(name: str, value: Any, most: int) -> None:
    if not is_whole(value) or not 1 <= value <= most:
        expected = f"a whole number from 1 to {most:,}"
        raise InputError(f"{name} is {shorten(repr(value), 30)}; expected {expected}")


def _in_lines(manifest: Mapping[str, Any]) -> str:
    """JSON with a line for each field, and for each array."""
    lines = []
    for name, value in manifest.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _shape(x: Any) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": np.dtype(x.dtype).name}
