"""GGUF files: the hub's names, shapes and values, and one line for every file that is not right."""

import os
import struct
import sys
import time
import tracemalloc
from typing import Any

import gguf
import gguf_files as files
import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from gguf_files import header, info, text, value
from safetensors.numpy import load_file

from slam_jax.errors import InputError, UserError
from slam_jax.interop import gguf_header
from slam_jax.interop.formats import make_layout, read_config
from slam_jax.interop.gguf import GGUF
from slam_jax.language_models import make_model

NAMES = ("llama", "llama_3_rope", "mistral", "qwen2", "qwen3")
each_golden = pytest.mark.parametrize("name", NAMES)


def published(name: str) -> dict[str, np.ndarray]:
    return load_file(files.GOLDENS / name / "model.safetensors")


def layout_of(source: GGUF) -> tuple[Any, Any, Any, Any]:
    kind, config = read_config(source.config)
    abstract = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    shapes: Any = flatten_dict(nnx.to_pure_dict(state))
    return graphdef, shapes, make_layout(kind, config, shapes), config


def load(source: GGUF) -> Any:
    """The model, filled by the tables of the hub's formats."""
    graphdef, shapes, layout, _ = layout_of(source)
    params: Any = {path: np.empty(shape.shape, np.float32) for path, shape in shapes.items()}
    for key, tensor in layout.items():
        for path, part in zip(tensor.paths, tensor.parts(source.read(key), shapes), strict=True):
            params[path][tensor.index] = part
    return nnx.merge(graphdef, nnx.State(unflatten_dict(params)))


@each_golden
def test_config_names_and_values_are_those_of_the_hub(name, tmp_path):
    source = GGUF(files.write_golden(tmp_path / "model.gguf", name))
    # llama.cpp does not store the window of Mistral.
    expected = files.golden_config(name) | {"sliding_window": None}
    assert read_config(source.config)[1] == read_config(expected)[1]
    assert source.config["model_type"] == files.architecture(name)
    tensors = published(name)
    assert source.stored.keys() == tensors.keys() == layout_of(source)[2].keys()
    for key, tensor in tensors.items():
        assert source.stored[key] == (source.name, tensor.shape, "F32")
        np.testing.assert_array_equal(source.read(key), tensor)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mistral"])
def test_logits_are_the_publishers(name, tmp_path):
    model = load(GGUF(files.write_golden(tmp_path / "model.gguf", name)))
    tokens, logits = (np.load(files.GOLDENS / name / f"{of}.npy") for of in ("tokens", "logits"))
    found = jax.jit(lambda model, tokens: model(tokens).logits)(model, tokens)
    np.testing.assert_allclose(found, logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_values_are_those_that_gguf_dequantises(name, tmp_path):
    kinds = {"attn_q.weight": "Q8_0", "attn_k.weight": "Q4_1", "attn_v.weight": "F16"}
    kinds |= {"attn_output.weight": "BF16", "ffn_up.weight": "Q4_1", "token_embd.weight": "Q8_0"}
    source = GGUF(files.write_golden(tmp_path / "model.gguf", name, quantised=kinds))
    config, is_llama = files.golden_config(name), name == "llama"
    heads = {".q_proj.": config["num_attention_heads"], ".k_proj.": config["num_key_value_heads"]}
    dtypes = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}
    for key, tensor in published(name).items():
        kind = next((k for end, k in kinds.items() if files.gguf_name(key).endswith(end)), "F32")
        found = source.read(key)
        assert source.stored[key].dtype == (kind if kind in dtypes else "F32")
        assert found.dtype == dtypes.get(kind, np.float32) and found.shape == tensor.shape
        if tensor.ndim == 1 or kind in ("F32", *dtypes):
            np.testing.assert_array_equal(found, tensor.astype(found.dtype))
            continue
        count = next((n for part, n in heads.items() if part in key and is_llama), None)
        stored = tensor if count is None else files.permute(tensor, count)
        of = gguf.GGMLQuantizationType[kind]
        expected = gguf.quants.dequantize(gguf.quants.quantize(stored, of), of)
        np.testing.assert_array_equal(files.permute(found, count) if count else found, expected)
        assert 0 < np.abs(found - tensor).max() < 0.1 * np.abs(tensor).max()


def test_biases_are_put_into_the_hubs_order_too(tmp_path):
    bias = np.arange(64, dtype=np.float32)
    tensors: dict[str, Any] = {}
    for layer in range(3):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            permuted = part in ("attn_q", "attn_k")
            tensors[f"blk.{layer}.{part}.bias"] = files.permute(bias, 4) if permuted else bias
    source = GGUF(files.write_golden(tmp_path / "model.gguf", "llama", tensors=tensors))
    assert source.config["attention_bias"] is True and source.config["mlp_bias"] is False
    assert source.stored.keys() == layout_of(source)[2].keys()
    for part in "qkvo":
        np.testing.assert_array_equal(
            source.read(f"model.layers.1.self_attn.{part}_proj.bias"), bias
        )


def test_a_file_without_an_output_has_tied_embeddings(tmp_path):
    path = files.write_golden(tmp_path / "model.gguf", "llama", tensors={"output.weight": None})
    source = GGUF(path)
    assert source.config["tie_word_embeddings"] is True
    assert source.stored.keys() == layout_of(source)[2].keys()


def test_one_value_for_each_layer_counts_as_one_where_all_are_equal(tmp_path):
    path = files.write_golden(tmp_path / "m", "qwen2", {".attention.head_count_kv": [2, 2, 2]})
    assert GGUF(path).config["num_key_value_heads"] == 2
    path = files.write_golden(tmp_path / "n", "qwen2", {".attention.head_count_kv": [2, 1, 2]})
    with pytest.raises(InputError, match="head_count_kv is 3 values; expected one value"):
        GGUF(path)


YARN = {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0}
YARN |= {".rope.scaling.original_context_length": 64, ".rope.scaling.yarn_beta_fast": 16.0}
FACTORS = np.array([1, 1.5, 2, 2.5, 3, 3.5, 4, 9], np.float32)


@pytest.mark.parametrize(
    ("changes", "tensors", "rope"),
    [
        ({".rope.freq_base": None}, {}, {"rope_theta": 1e4}),
        ({".rope.freq_base": 5e5, ".rope.scaling.type": "none"}, {}, {"rope_theta": 5e5}),
        ({".rope.scaling.type": "none", ".rope.scaling.factor": 2.0}, {}, {}),
        (
            {".rope.scaling.type": "linear", ".rope.scaling.factor": 2.0},
            {},
            {"rope_type": "linear", "factor": 2.0},
        ),
        ({".rope.scale_linear": 4.0}, {}, {"rope_type": "linear", "factor": 4.0}),
        (
            YARN,
            {},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
            | {"beta_fast": 16.0, "beta_slow": 1.0},
        ),
        (
            {},
            {"rope_freqs.weight": FACTORS},
            {"rope_type": "longrope", "short_factor": FACTORS.tolist(), "attention_factor": 1.0}
            | {"long_factor": FACTORS.tolist(), "original_max_position_embeddings": 256},
        ),
    ],
)
def test_rotary_positions(changes, tensors, rope, tmp_path):
    source = GGUF(files.write_golden(tmp_path / "model.gguf", "llama", changes, tensors))
    expected = {"rope_type": "default", "rope_theta": 1e4} | rope
    assert source.config["rope_parameters"] == expected
    width = source.config["head_dim"]
    frequencies = read_config(source.config)[1].rope.frequencies(width)
    if tensors:
        plain = expected["rope_theta"] ** (-np.arange(0, width, 2) / width)
        np.testing.assert_allclose(frequencies, plain / FACTORS, rtol=1e-6)


REFUSED = [
    ({"general.architecture": "mistral3"}, "general.architecture is 'mistral3'; expected one of"),
    ({"general.type": "adapter"}, "general.type is 'adapter'; expected model"),
    ({"general.quantization_version": 1}, "general.quantization_version is 1; expected 2"),
    ({"split.count": 3}, "split.count is 3; expected 1, .* llama-gguf-split --merge"),
    ({".attention.sliding_window": 16}, "llama.attention.sliding_window is 16; expected nothing"),
    ({".attention.causal": False}, "llama.attention.causal is False; expected nothing"),
    ({".expert_count": 8}, "llama.expert_count is 8; expected nothing"),
    ({".logit_scale": 0.5}, "llama.logit_scale is 0.5; expected nothing"),
    ({".attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping is 50.0; expected nothing"),
    ({".some.thing": "else"}, "llama.some.thing is 'else'; expected nothing"),
    ({".layers": [0, 1]}, "llama.layers is 2 values; expected nothing"),
    ({".rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'; expected none, linear"),
    (YARN | {".rope.scaling.yarn_attn_factor": 0.7}, "yarn_attn_factor is 0.7; expected nothing"),
    ({".rope.scaling.factor": -2.0}, "rope.scaling.factor is -2.0; expected a number above 0"),
    ({".rope.dimension_count": 8}, "rope.dimension_count is 8; expected 16"),
    ({".attention.value_length": 8}, "attention.value_length is 8; expected 16"),
    ({".attention.head_count": 0}, "attention.head_count is 0; expected a whole number from 1"),
    ({".attention.head_count": 3}, r"blk.0.attn_q.weight is \[64, 64\]; expected 48 rows"),
    ({".embedding_length": None}, "llama.embedding_length is None; expected a whole number"),
    ({".embedding_length": True}, "llama.embedding_length is True; expected a whole number"),
    ({".context_length": 1 << 31}, "llama.context_length is 2147483648; expected a whole number"),
    ({".block_count": "many"}, "llama.block_count is 'many'; expected a whole number"),
    ({"tokenizer.ggml.tokens": ["a"] * 161}, "it has 161 tokens; expected at most 160"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_values_that_are_not_built_are_named(changes, message, tmp_path):
    kind = changes.get("general.architecture", "llama")
    metadata = {f".{key}": each for key, each in files.golden_metadata("llama").items()}
    changes = {key: each for key, each in changes.items() if key != "general.architecture"}
    path = tmp_path / "model.gguf"
    files.write(path, kind, metadata | changes, files.golden_tensors("llama"))
    with pytest.raises(InputError, match=message) as caught:
        GGUF(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_values_that_change_nothing_are_read(tmp_path):
    changes: dict[str, Any] = {".attention.sliding_window": 256, ".expert_count": 0}
    changes |= {".tensor_data_layout": "Meta AI original pth", ".attention.causal": True}
    changes |= {"general.name": "x", "quantize.imatrix.file": "y", ".rope.scaling.attn_factor": 1.0}
    plain = GGUF(files.write_golden(tmp_path / "plain.gguf", "llama"))
    source = GGUF(files.write_golden(tmp_path / "model.gguf", "llama", changes))
    assert source.config == plain.config


@pytest.mark.parametrize("name", ["blk.0.attn_qkv.weight", "blk.01.attn_q.weight", "x\n", "output"])
def test_tensors_that_are_not_built_are_named(name, tmp_path):
    tensors = {name: np.ones((4, 4), np.float32)}
    path = files.write_golden(tmp_path / "model.gguf", "llama", tensors=tensors)
    with pytest.raises(InputError, match="tensor .* is not built") as caught:
        GGUF(path)
    assert "\n" not in str(caught.value)


def test_without_the_library_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    path = files.write_golden(tmp_path / "model.gguf", "llama")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'slam_jax\[gguf\]'"):
        GGUF(path)


# --- Files that lie

HUGE = 1 << 62
ONE = [info("a", (32,))]
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with GGUF"),
    "another format": (b"\x80\x04pickle" * 9, "does not begin with GGUF"),
    "version 1": (header(version=1), "version 1; expected .* version 2 or 3"),
    "big-endian": (header(version=3 << 24), "its numbers are big-endian"),
    "the counts are cut": (header()[:20], "ends inside of"),
    "many tensors": (header(infos=HUGE), "there are 4,611.* tensors, too many"),
    "many values": (header(HUGE), "there are 4,611.* metadata, too many"),
    "more tensors than are there": (header(infos=2) + b"\0" * 99, "ends inside of|0 axes"),
    "a long name": (header([text("key", HUGE)]), "has 4,611.* bytes; expected at most"),
    "a long text": (header([value("key", 8, text("x", HUGE))]), "key has 4,611.* bytes"),
    "a text beyond the end": (header([value("key", 8, text("x", 99))]), "ends inside of key"),
    "a name that is not UTF-8": (header([text(b"\xff") + b"\0" * 9]), "is not UTF-8"),
    "an unknown type": (header([value("key", 13, b"")], data=64), "key has the unknown type 13"),
    "a name twice": (header([value("key", 7, b"\1")] * 2), "key is there twice"),
    "a long array": (
        header([value("key", 9, struct.pack("<IQ", 4, HUGE))]),
        "there are 4,611.* key, too many",
    ),
    "a long array of texts": (
        header([value("key", 9, struct.pack("<IQ", 8, HUGE))]),
        "there are 4,611.* key, too many",
    ),
    "more texts than there is room for": (
        header([value("key", 9, struct.pack("<IQ", 8, 1_000))], data=512),
        "there are 1,000 key, too many",
    ),
    "an array of arrays": (
        header([value("key", 9, struct.pack("<IQIQ", 9, 1, 9, 1))], data=64),
        "key has arrays in an array",
    ),
    "an alignment of 0": (
        header([value("general.alignment", 4, struct.pack("<I", 0))]),
        "general.alignment is no number of bytes",
    ),
    "an alignment of words": (
        header([value("general.alignment", 8, text("x"))]),
        "general.alignment is no number of bytes",
    ),
    "no axes": (header(infos=[info("a", ())], data=256), "a has 0 axes"),
    "many axes": (header(infos=[info("a", (1,) * 5)], data=256), "a has 5 axes"),
    "a size of 0": (header(infos=[info("a", (32, 0))], data=256), "and at least one"),
    "rows of half a block": (header(infos=[info("a", (33, 2), 8)], data=256), "multiple of 32"),
    "a huge shape": (header(infos=[info("a", (HUGE,) * 4)], data=256), "and the file only"),
    "a shape of too many bytes": (header(infos=[info("a", (65,))], data=256), "260 bytes at 64"),
    "an offset beyond the end": (header(infos=[info("a", (1,), 0, HUGE)]), "and the file only"),
    "an odd offset": (header(infos=[info("a", (1,), 0, 3)], data=256), "a is not aligned to 32"),
    "the same bytes twice": (header(infos=[*ONE, info("b", (32,))], data=256), "inside of another"),
    "a tensor twice": (header(infos=ONE * 2, data=256), "the tensor a is there twice"),
    "an unknown quantisation": (header(infos=[info("a", (1,), 999)]), "a has type 999, which gguf"),
    "integers": (header(infos=[info("a", (1,), 26)], data=64), "a has type 26, which gguf"),
    "no architecture": (header(), "general.architecture is None; expected one of"),
    "an architecture alone": (
        header([value("general.architecture", 8, text("llama"))]),
        "llama.attention.head_count is None",
    ),
}


@pytest.mark.parametrize("what", LIES)
def test_headers_that_lie_are_one_line(what, tmp_path):
    content, message = LIES[what]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    gguf.quants.dequantize(np.zeros((1, 34), np.uint8), gguf.GGMLQuantizationType.Q8_0)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message) as caught:
            GGUF(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_large_header_is_refused_before_it_is_read(tmp_path):
    """A sparse file takes no room on the disk, but its texts would take all of the memory."""
    path = tmp_path / "model.gguf"
    path.write_bytes(header([value("a", 8, text("", gguf_header._LARGEST_HEADER))]))
    os.truncate(path, 1 << 36)
    start = time.monotonic()
    with pytest.raises(InputError, match="its header is larger than 67,108,864 bytes"):
        GGUF(path)
    counted = value("a", 9, struct.pack("<IQ", 8, gguf_header._MOST_STRINGS + 1))
    path.write_bytes(header([counted]))
    os.truncate(path, 1 << 36)
    with pytest.raises(InputError, match="there are 2,097,153 a, too many"):
        GGUF(path)
    assert time.monotonic() - start < 5


def test_paths_that_are_no_files_are_one_line(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    bad = ["fifo", "dangling", "nowhere", "", "/dev/zero", "a\0b", "x" * 5_000]
    for name in bad:
        with pytest.raises(InputError, match="expected a (GGUF )?file") as caught:
            GGUF(tmp_path / name)
        assert "\n" not in str(caught.value)
    path = files.write_golden(tmp_path / "model.gguf", "llama")
    (tmp_path / "link").symlink_to(path)
    assert GGUF(tmp_path / "link").config == GGUF(path).config


def test_a_file_that_was_cut_since_it_was_opened_is_named(tmp_path):
    path = files.write_golden(tmp_path / "model.gguf", "llama")
    source = GGUF(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(InputError, match="cut while it was read"):
        for key in source.stored:
            source.read(key)


def damage(content: bytes, end: int, rng: np.random.Generator) -> bytes:
    """The content with one to four bytes or numbers before `end` changed, or cut."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(0, end))
        extremes = (0, 1, 31, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1)
        number = struct.pack("<Q", int(rng.choice(np.array(extremes, np.uint64))))
        width = int(rng.choice([1, 1, 4, 8]))
        new = rng.bytes(1) if width == 1 else number[:width]
        changed[place : place + width] = new
    cut = int(rng.integers(0, len(changed))) if rng.random() < 0.1 else len(changed)
    return bytes(changed[:cut])


@pytest.mark.parametrize("count", [200, pytest.param(2_000, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_named_in_one_line(count, tmp_path):
    tokens: dict[str, Any] = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(160)]}
    tokens |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": [-float(i) for i in range(160)],
    }
    tokens |= {"tokenizer.ggml.token_type": [1] * 160, "tokenizer.ggml.bos_token_id": 1}
    path = files.write_golden(tmp_path / "m", "llama", tokens, quantised={"q.weight": "Q8_0"})
    content, refused = path.read_bytes(), 0
    end = min(block.offset for block in gguf_header.read_header(path).tensors.values())
    rng = np.random.default_rng(count)
    start = time.monotonic()
    for _ in range(count):
        path.write_bytes(damage(content, end, rng))
        try:
            source = GGUF(path)
            for key in source.stored:
                assert source.read(key).shape == source.stored[key].shape
            assert source.tokenizer_json is None or source.tokenizer_json
            assert source.tokenizer_config is not None and source.generation_config is not None
            read_config(source.config)
        except UserError as error:
            refused += 1
            assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 1_000
    assert time.monotonic() - start < 0.1 * count
    assert count // 3 < refused < count


# --- A real file


@pytest.mark.slow
def test_names_and_shapes_of_a_real_file_fit():
    source = GGUF(files.real_file())
    _, shapes, layout, config = layout_of(source)
    assert (config.num_layers, config.embed_dim, config.vocab_size) == (30, 576, 49_152)
    assert config.tie_embeddings and config.rope.base == 1e5 and config.norm_epsilon == 1e-5
    assert source.stored.keys() == layout.keys()
    for key, tensor in layout.items():
        assert source.stored[key].shape == tensor.shape(shapes)
        found = source.read(key)
        assert found.dtype == np.float32 and np.isfinite(found).all()
