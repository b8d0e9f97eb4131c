"""Folders with published weights as people have them: which files are read, in which dtype, and
what becomes of damaged ones."""

import json
import os
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same
from safetensors.numpy import save_file

from slam_jax.errors import UserError
from slam_jax.interop import load_preprocessing, load_pretrained, load_vision, save_pretrained
from slam_jax.interop.filling import fill
from slam_jax.interop.formats import make_layout, read_config
from slam_jax.interop.pretrained import write_folder
from slam_jax.interop.weights import Source, Stored, find_weights, read_json
from slam_jax.language_models import make_model

pytestmark = pytest.mark.release

GOLDENS = Path(__file__).parent / "goldens"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn"}


def load_file(path: Path) -> dict[str, np.ndarray]:
    """As safetensors has it, which knows no float8 of NumPy."""
    content = path.read_bytes()
    first = 8 + struct.unpack("<Q", content[:8])[0]
    tensors = json.loads(content[8:first])
    tensors.pop("__metadata__", None)
    found = {}
    for key, x in tensors.items():
        data = content[first:][slice(*x["data_offsets"])]
        found[key] = np.frombuffer(data, jnp.dtype(DTYPES[x["dtype"]])).reshape(x["shape"]).copy()
    return found


def state(model: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(model))


def copy(name: str, to: Path) -> Path:
    return Path(shutil.copytree(GOLDENS / name, to / name))


@pytest.fixture
def folder(tmp_path) -> Path:
    return copy("mistral", tmp_path)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder: str | Path, message: str, load: Any = load_pretrained) -> None:
    begin = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1_000
    assert time.monotonic() - begin < 20


# --- Which files are read


def test_any_source_of_weights_fills_a_model(folder):
    class Memory:
        name = Path("memory")

        def __init__(self, tensors: dict[str, np.ndarray]):
            self.tensors = tensors
            self.stored = {k: Stored(self.name, v.shape, "F32") for k, v in tensors.items()}

        def read(self, key: str) -> np.ndarray:
            return self.tensors[key]

    kind, config = read_config(read_json(folder / "config.json"))
    source = Memory(load_file(folder / WEIGHTS))
    assert isinstance(source, Source)
    model = fill(
        lambda: make_model(config, rngs=nnx.Rngs(0)),
        lambda shapes: make_layout(kind, config, shapes),
        source,
    )
    assert_same(state(model), state(load_pretrained(folder)[0]))


def test_other_weights_beside_those_of_the_model_are_named_once_and_not_read(folder, caplog):
    expected = state(load_pretrained(folder)[0])
    others = ("adapter_model", "consolidated", "model.fp16", "model-00001-of-00002.fp16")
    for name in others:
        shutil.copy(folder / WEIGHTS, folder / f"{name}.safetensors")
    (folder / "._model.safetensors").write_bytes(b"of macOS")
    for index in (None, {"weight_map": dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS)}):
        if index is not None:
            (folder / INDEX).write_text(json.dumps(index))
        caplog.clear()
        assert_same(state(load_pretrained(folder)[0]), expected)
        (message,) = caplog.messages
        assert all(f"{name}.safetensors" in message for name in others)
        assert message.endswith("are not read") and "._model" not in message


def test_an_index_decides_which_files_are_read(folder, caplog):
    expected = state(load_pretrained(folder)[0])
    os.replace(folder / WEIGHTS, folder / "part-1.safetensors")
    (folder / WEIGHTS).write_bytes(b"old, and no weights")
    index = {"weight_map": {"model.norm.weight": "part-1.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    assert_same(state(load_pretrained(folder)[0]), expected)
    assert caplog.messages == [f"{folder}: model.safetensors is not read"]


def test_the_only_file_is_read_whatever_its_name_and_of_several_none_is_chosen(folder):
    expected = state(load_pretrained(folder)[0])
    os.replace(folder / WEIGHTS, folder / "consolidated.safetensors")
    assert_same(state(load_pretrained(folder)[0]), expected)
    shutil.copy(folder / "consolidated.safetensors", folder / "model.fp16.safetensors")
    refused(folder, "neither model.safetensors.index.json nor model.safetensors, but consolidated")


def test_the_name_of_a_model_on_the_hub_is_answered_with_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "meta-llama/Llama-3.2-1B"
    for load in (load_pretrained, load_vision, load_preprocessing):
        refused(name, rf"^{name}: no such folder; .*`hf download {name} --local-dir DIR`", load)
    refused("./no/such", "config.json: No such file or directory; expected the folder of")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": [{}] * 3}, r"layer_types is \[{}, {}, {}\]; expected"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 8,
                    "original_max_position_embeddings": 0,
                },
                "original_max_position_embeddings": 0,
            },
            "rope_.* is .*; expected another value",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_value_with_which_nothing_can_be_computed_is_named(tmp_path, kind, changes, message):
    folder = copy(kind, tmp_path)
    edit(folder, rope_scaling=None, **changes)
    refused(folder, message)


# --- An output head beside tied embeddings


def test_a_stored_head_beside_tied_embeddings_is_not_used(tmp_path, caplog):
    folder = copy("qwen2", tmp_path)
    edit(folder, tie_word_embeddings=True)
    change_weights(folder, lambda t: t.pop("lm_head.weight", None))
    expected = state(load_pretrained(folder)[0])
    table = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    for head, warns in ((table, False), (table + 1, True), (table[1:], True)):
        caplog.clear()
        change_weights(folder, lambda t, head=head: t.update({"lm_head.weight": head}))
        assert_same(state(load_pretrained(folder)[0]), expected)
        assert len(caplog.messages) == warns
        assert all("lm_head.weight is not read: " in message for message in caplog.messages)


def test_a_head_and_embeddings_that_are_no_tables_are_refused(tmp_path):
    folder = copy("qwen2", tmp_path)
    edit(folder, tie_word_embeddings=True)
    number = np.zeros((), np.float32)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    change_weights(folder, lambda t: t.update(dict.fromkeys(names, number)))
    refused(folder, "model.embed_tokens.weight")


# --- Dtypes


@pytest.mark.parametrize("scan_layers", [False, True])
def test_each_parameter_has_the_dtype_that_is_stored(tmp_path, scan_layers):
    """Maps in bfloat16 and norms in float32, of which one layer's are bfloat16 too."""
    folder = copy("deepseek_v2", tmp_path)
    for name, spelled in (("dtype", "auto"), ("dtype", "bf16"), ("torch_dtype", "bfloat16")):
        edit(folder, **{"dtype": None, name: spelled})
        read_config(read_json(folder / "config.json"))
    half, mixed = jnp.bfloat16, "layers.1.input_layernorm.weight"

    def narrow(tensors: dict[str, np.ndarray]) -> None:
        for key, x in tensors.items():
            if "norm" not in key or mixed in key:
                tensors[key] = x.astype(half)

    change_weights(folder, narrow)
    model, config = load_pretrained(folder, scan_layers=scan_layers)
    assert config.param_dtype == "bfloat16"
    for path, leaf in jax.tree_util.tree_leaves_with_path(state(model)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        alone = "blocks/1/attention_norm" in name
        assert (leaf.dtype == half) == ("norm" not in name or alone), name
    cast, config = load_pretrained(folder, param_dtype="float32", scan_layers=scan_layers)
    assert config.param_dtype == "float32"
    jax.tree.map(lambda a, b: assert_same(a, b.astype(jnp.float32)), state(cast), state(model))
    tokens = np.load(folder / "tokens.npy")
    logits = [jax.jit(lambda m: m(tokens).logits)(each) for each in (model, cast)]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_the_widest_of_joined_weights_counts_and_float16_becomes_float32(tmp_path):
    folder = copy("jamba", tmp_path)
    experts = "layers.1.feed_forward.experts"

    def narrow(tensors: dict[str, np.ndarray]) -> None:
        for key, x in tensors.items():
            dtype = np.float16 if "o_proj" in key else ml_dtypes.bfloat16
            if f"{experts}.0." not in key:
                tensors[key] = x.astype(dtype)

    change_weights(folder, narrow)
    model = state(load_pretrained(folder)[0])
    found = {k: v["kernel"].dtype for k, v in model["blocks"][1]["mlp"]["experts"].items()}
    assert set(found.values()) == {jnp.dtype("float32")}
    attention = next(b["mixer"] for b in model["blocks"].values() if "query" in b["mixer"])
    assert attention["out"]["kernel"].dtype == jnp.float32
    assert attention["query"]["kernel"].dtype == jnp.bfloat16


# --- Numbers that are none


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nan_and_infinity_are_refused_by_name_unless_asked(folder, dtype):
    key = "model.layers.1.mlp.up_proj.weight"
    for bad in (np.nan, np.inf, -np.inf):

        def spoil(tensors: dict[str, np.ndarray], bad: float = bad) -> None:
            x = tensors[key].astype(dtype)
            x[-1, 3] = bad
            tensors[key] = x

        change_weights(folder, spoil)
        refused(folder, f"model.safetensors: {key} has NaN or infinity; download it again, or load")
    load_pretrained(folder, check_finite=False)
    vision = copy("vision/vit", folder)
    change_weights(vision, lambda t: t["layernorm.bias"].fill(np.nan))
    refused(vision, "layernorm.bias has NaN", load_vision)
    load_vision(vision, check_finite=False)


def test_the_largest_numbers_are_finite(folder):
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        most = ml_dtypes.finfo(dtype).max
        for norm in (np.full(64, most, dtype), np.full(64, -most, dtype)):
            change_weights(folder, lambda t, norm=norm: t.update({"model.norm.weight": norm}))
            load_pretrained(folder)


# --- Eight bits


def quantise(x: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Each block divided by its largest number over 448, which is the largest of float8."""
    grid = (-(-x.shape[0] // rows), -(-x.shape[1] // columns))
    scales = np.empty(grid, np.float32)
    narrow = np.empty(x.shape, ml_dtypes.float8_e4m3fn)
    for i, j in np.ndindex(grid):
        block = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scales[i, j] = np.abs(x[block]).max() / 448
        narrow[block] = x[block] / scales[i, j]
    return narrow, scales


def dequantised(narrow: np.ndarray, scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    i, j = (np.arange(n) // size for n, size in zip(narrow.shape, (rows, columns), strict=True))
    return narrow.astype(np.float32) * scales[i][:, j]


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def make_fp8(folder: Path, rows: int, columns: int, scale: Any = np.float32) -> dict[str, Any]:
    """The maps of all layers in eight bits; the same weights without is what is returned."""
    tensors = load_file(folder / WEIGHTS)
    expected = dict(tensors)
    for key in [k for k in tensors if ".layers." in k and k.endswith("_proj.weight")]:
        narrow, scales = quantise(tensors[key], rows, columns)
        scales = scales.astype(scale)
        tensors |= {key: narrow, f"{key}_scale_inv": scales}
        expected[key] = dequantised(narrow, scales.astype(np.float32), rows, columns)
    save_file(tensors, folder / WEIGHTS)
    edit(folder, quantization_config={**FP8, "weight_block_size": [rows, columns]})
    return expected


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (16, 40), (7, 5)])
def test_blocks_of_eight_bits_are_multiplied_by_their_scales(tmp_path, rows, columns, caplog):
    folder, plain = copy("deepseek_v3", tmp_path), copy("deepseek_v3", tmp_path / "plain")
    save_file(make_fp8(folder, rows, columns), plain / WEIGHTS)
    with caplog.at_level("INFO", "slam_jax"):
        found, config = load_pretrained(folder, param_dtype="float32")
    assert "weights are F8_E4M3, and are dequantised" in caplog.messages[0]
    expected, _ = load_pretrained(plain)
    assert_same(state(found), state(expected))
    half, config = load_pretrained(folder)
    kernel = state(half)["blocks"][1]["mlp"]["experts"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and config.param_dtype == "bfloat16"
    whole = state(expected)["blocks"][1]["mlp"]["experts"]["up"]["kernel"]
    assert_same(kernel, whole.astype(jnp.bfloat16))
    tokens, logits = (np.load(folder / f"{name}.npy") for name in ("tokens", "logits"))
    near = jax.jit(lambda m: m(tokens).logits)(found)
    assert 1e-3 < np.abs(near - logits).mean() < 0.2 * logits.std()


def test_scales_may_be_bfloat16_or_one_a_weight(tmp_path):
    folder, plain = copy("qwen3", tmp_path), copy("qwen3", tmp_path / "plain")
    save_file(make_fp8(folder, 10**6, 10**6, ml_dtypes.bfloat16), plain / WEIGHTS)
    expected = state(load_pretrained(plain)[0])
    assert_same(state(load_pretrained(folder, param_dtype="float32")[0]), expected)

    def flatten(tensors: dict[str, np.ndarray]) -> None:
        for key in [key for key in tensors if key.endswith("_scale_inv")]:
            tensors[key] = tensors[key].reshape(())

    change_weights(folder, flatten)
    refused(folder, r"weight_scale_inv is \[\]; expected \[1, 1\], as the weight is")
    edit(folder, quantization_config={**FP8, "weight_block_size": None})
    assert_same(state(load_pretrained(folder, param_dtype="float32")[0]), expected)


def test_scales_that_do_not_fit_are_named(tmp_path):
    folder = copy("qwen3", tmp_path)
    make_fp8(folder, 32, 32)
    key = "model.layers.1.mlp.up_proj.weight"
    scale = f"{key}_scale_inv"
    whole = load_file(folder / WEIGHTS)
    for change, message in (
        (lambda t: t.pop(scale), f"{key} is F8_E4M3, but there is no {scale}"),
        (lambda t: t.update({scale: t[scale][:1]}), rf"{scale} is \[1, 2\]; expected \[\d+, 2\]"),
        (lambda t: t.update({scale: t[scale].astype(np.int8)}), f"{scale} is I8; expected one of"),
        (lambda t: t.update({scale: t[scale] * np.nan}), f"{key} has NaN or infinity"),
        (lambda t: t.update({key: t[key].astype(np.float32)}), rf"left over \({scale}\)"),
        (lambda t: t.update({key: t[key].view(np.int8)}), rf"left over \({scale}\)"),
    ):
        save_file(dict(whole), folder / WEIGHTS)
        change_weights(folder, change)
        refused(folder, message)
    edit(folder, quantization_config=None)
    save_file(whole, folder / WEIGHTS)
    refused(folder, r"left over \(.*_scale_inv")
    change_weights(folder, lambda t: [t.pop(k) for k in list(t) if k.endswith("_scale_inv")])
    refused(folder, "weight is F8_E4M3; expected one of F32, BF16, F16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method is 'gptq'; expected 'fp8'"),
        ({"quant_method": None}, "quantization_config.quant_method is None; expected 'fp8'"),
        ({"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'; expected 'e4m3'"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'; expected 'dynamic'"),
        ({"expert_dtype": "fp4"}, "expert_dtype is 'fp4'; expected 'fp8'"),
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\]; expected two whole numbers"),
        ({"weight_block_size": [128, 0]}, "expected two whole numbers, or null"),
        ({"weight_block_size": [128, True]}, "expected two whole numbers, or null"),
        ({"bits": 8}, "quantization_config.bits is 8; expected nothing: it is not built"),
    ],
)
def test_other_kinds_of_quantisation_are_refused_by_name(folder, changes, message):
    edit(folder, quantization_config={**FP8, **changes})
    refused(folder, message)
    edit(folder, quantization_config=[1])
    refused(folder, r"quantization_config is \[1\]; expected a group of fields")


# --- Hostile folders


def test_a_pipe_a_device_or_a_directory_in_place_of_a_file_is_refused_at_once(folder):
    index = json.dumps({"weight_map": {"model.norm.weight": WEIGHTS}})
    (folder / INDEX).write_text(index)
    for name in ("config.json", INDEX, WEIGHTS):
        path = folder / name
        content = path.read_bytes()
        for make in (os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p)):
            path.unlink()
            make(path)
            refused(folder, rf"{name}(: expected a file$|: '.*' is not a file|.* is not a file of)")
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(content)
        path.unlink()
        path.symlink_to("nowhere")
        refused(folder, f"{name}")
        path.unlink()
        path.write_bytes(content)
    (folder / INDEX).unlink()
    (folder / WEIGHTS).unlink()
    for make in (os.mkfifo, os.mkdir, lambda p: os.symlink("nowhere", p)):
        make(folder / WEIGHTS)
        refused(folder, "model.safetensors: not a file; expected a safetensors file")
        (folder / WEIGHTS).rmdir() if make is os.mkdir else (folder / WEIGHTS).unlink()
    refused(folder / "config.json", "Not a directory")


def test_links_to_files_are_followed_also_out_of_the_folder(folder, tmp_path):
    """The cache of the hub is made of them."""
    expected = state(load_pretrained(folder)[0])
    (tmp_path / "blobs").mkdir()
    for name in ("config.json", WEIGHTS):
        os.replace(folder / name, tmp_path / "blobs" / name)
        (folder / name).symlink_to(Path("..", "blobs", name))
    index = {"weight_map": {"model.norm.weight": WEIGHTS}}
    (folder / INDEX).write_text(json.dumps(index))
    assert_same(state(load_pretrained(folder)[0]), expected)


def header(tensors: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    [
        header({"a": entry([4], 0, 16)}, b"\0" * 8),  # beyond the file
        header({"a": entry([4], 0, 8)}, b"\0" * 8),  # another size than its shape has
        header({"a": entry([2], 0, 8, "BF16")}, b"\0" * 8),
        header({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"\0" * 8),  # one over another
        header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12),  # a gap
        header({"a": entry([2**40, 2**40], 0, 8)}, b"\0" * 8),
        header({"a": entry([2**62, 4], 0, 0)}),
        header({"a": entry([-2], 0, 8)}, b"\0" * 8),
        header({"a": entry([2], 2**63, 2**63 + 8)}, b"\0" * 8),
        header({"a": entry([2], 8, 0)}, b"\0" * 8),
        header({"a": entry([2], 0, 8)}, b"\0" * 9),  # a rest
        header({"a": entry([2], 0, 8, "F7")}, b"\0" * 8),
        header({"a": {"shape": [2]}}, b"\0" * 8),
        header({"a": 3}),
        header([1]),
        header(b"[" * 100_000),
        header(b'{"a":' * 100_000),
        header(b"\xff" * 9),
        header(b"{}", length=2**63),
        header(b"{}", length=10**9),
        header(b"{}", length=2**24 + 1),
        b"\x02",
        b"",
    ],
)
def test_a_header_that_lies_is_one_line(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "model.safetensors: .*; expected a safetensors file")


def test_an_empty_file_of_weights_and_shapes_without_numbers_are_misfits(folder):
    (folder / WEIGHTS).write_bytes(header({}))
    refused(folder, "num_layers 3, but there are only 0 weights")
    tensors = {key: entry([0, 2**60], 0, 0) for key in load_file(GOLDENS / "mistral" / WEIGHTS)}
    (folder / WEIGHTS).write_bytes(header(tensors))
    refused(folder, r"is \[0, 1152921504606846976\]; config.json makes it \[")


@pytest.mark.parametrize("name", ["llama", "jamba", "deepseek_v3", "mixtral", "hunyuan_large"])
def test_huge_sizes_in_a_configuration_take_no_memory(tmp_path, name):
    folder = copy(name, tmp_path)
    data = json.loads((folder / "config.json").read_text())
    keep = {"num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts"}
    keep |= {"num_nextn_predict_layers", "n_group", "topk_group", "moe_topk", "cla_share_factor"}
    sizes = [k for k, v in data.items() if type(v) is int and v > 3 and k not in keep]
    assert "hidden_size" in sizes and len(sizes) > 4
    edit(folder, **dict.fromkeys(sizes, 2**20))
    refused(folder, r"config.json makes it \[|expected|weights do not fit")
    message = r"is .*; config.json makes it \["
    for key in ("hidden_size", "vocab_size", "intermediate_size"):
        edit(folder, **{**data, key: 2**20})
        refused(folder, message)


def test_further_files_are_written_beside_the_weights(folder, tmp_path):
    model, _ = load_pretrained(folder)
    save_pretrained(model, tmp_path / "saved")
    write_folder(
        tmp_path / "more",
        model,
        lambda params: make_layout("mistral", model.config, params),
        {"config.json": read_json(folder / "config.json")},
        max_shard_bytes=10**9,
        files={"chat_template.jinja": "{{ 'ü' }}", "tokenizer.json": b"\0\xff"},
    )
    assert (tmp_path / "more" / "chat_template.jinja").read_text("utf-8") == "{{ 'ü' }}"
    assert (tmp_path / "more" / "tokenizer.json").read_bytes() == b"\0\xff"
    assert_same(state(load_pretrained(tmp_path / "more")[0]), state(model))
    assert len(find_weights(tmp_path / "saved").stored) == len(load_file(folder / WEIGHTS))
