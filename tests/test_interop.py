"""Published weights: each is read once, gives the publisher's logits, and is written back to the
last bit."""

import functools
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from helpers import assert_same
from safetensors.flax import load_file, save_file

from slam_jax.errors import UserError
from slam_jax.interop import load_pretrained, save_pretrained
from slam_jax.interop.formats import FORMATS, make_layout, read_config, write_config
from slam_jax.language_models import SYSTEMS, make_config, make_model
from slam_jax.layers.rotary import Rope, Yarn
from slam_jax.layers.stacked import StackedLayers
from slam_jax.training.checkpoint.trees import by_name

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.parent.name for path in GOLDENS.glob("*/logits.npy"))

# What makes the model of a type its own, where several types share a configuration.
SWITCHES: dict[str, dict[str, Any]] = {
    "mistral": {"window": 5},
    "qwen2": {"qkv_bias": True, "head_dim": None},
    "qwen3": {"qk_norm": "before_rotation", "window": 5},
    "hunyuan_v1_dense": {"qk_norm": "after_rotation"},
    "deepseek_v3": {"sigmoid": True},
}

# One of each kind of cache; the others are tested before a release.
CACHES = ("llama", "deepseek_v2", "jamba")

each_golden = pytest.mark.parametrize("name", NAMES)


def state(model: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(model))


@functools.cache
def golden(name: str) -> tuple[Any, Any]:
    """The model of a fixture and its configuration, read once for all tests."""
    return load_pretrained(GOLDENS / name)


@jax.jit
def logits(model: Any, tokens: Any) -> Any:
    return model(tokens).logits


@each_golden
def test_logits_are_the_publishers(name):
    model, config = golden(name)
    tokens, expected = (np.load(GOLDENS / name / f"{what}.npy") for what in ("tokens", "logits"))
    assert expected.std() > 0.5 and config.dtype == "float32"
    np.testing.assert_allclose(logits(model, tokens), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x in CACHES else pytest.mark.release) for x in NAMES],
)
def test_the_cached_decode_gives_the_publishers_logits_too(name):
    model, _ = golden(name)
    tokens, expected = (np.load(GOLDENS / name / f"{what}.npy") for what in ("tokens", "logits"))
    rows, length = tokens.shape
    start = length // 2
    cache = model.init_cache((rows,), length)
    _, cache = jax.jit(lambda m, t, c: m.prefill(t, c))(model, tokens[:, :start], cache)
    step = jax.jit(lambda m, t, c: m.decode_step(t, c))
    for t in range(start, length):
        found, cache = step(model, tokens[:, t], cache)
        np.testing.assert_allclose(found, expected[:, t], atol=2e-4, rtol=0)


@each_golden
def test_what_is_saved_is_what_was_read_to_the_last_bit(name, tmp_path):
    model, config = golden(name)
    save_pretrained(model, tmp_path / "copy")
    again, config_again = load_pretrained(tmp_path / "copy")
    assert config_again == config
    assert_same(state(again), state(model))
    theirs = load_file(GOLDENS / name / "model.safetensors")
    ours = load_file(tmp_path / "copy" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert_same(dict(sorted(ours.items())), dict(sorted(theirs.items())))
    kinds = [
        json.loads((path / "config.json").read_text())["model_type"]
        for path in (tmp_path / "copy", GOLDENS / name)
    ]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_parameter_has_exactly_one_place(kind):
    """In published files and in fused ones, at odd and even numbers of layers."""
    name = next(name for name, s in SYSTEMS.items() if s.config is FORMATS[kind].config)
    for changes in ({}, {"num_layers": 5, "tie_embeddings": True, "scan_layers": True}):
        config = make_config(name, "tiny", **{**SWITCHES.get(kind, {}), **changes})
        model = nnx.eval_shape(lambda config=config: make_model(config, rngs=nnx.Rngs(0)))
        shapes: dict[Any, Any] = flatten_dict(state(model))
        for fused in (False, True):
            places = [
                (path, tensor.index)
                for tensor in make_layout(kind, config, shapes, fused=fused).values()
                for path in tensor.paths
            ]
            expected = []
            for path, p in shapes.items():
                stacked = any(":" in str(key) for key in path)  # layers
                axes = stacked + ("experts" in path and not fused)
                expected += [(path, index) for index in np.ndindex(p.shape[:axes])]
            assert sorted(places, key=str) == sorted(expected, key=str)


def test_layers_that_predict_further_tokens_are_skipped_and_named_once(tmp_path, caplog):
    model, _ = golden("deepseek_v3")
    shutil.copytree(GOLDENS / "deepseek_v3", tmp_path / "more")
    tensors = load_file(GOLDENS / "deepseek_v3" / "model.safetensors")
    for key in [key for key in tensors if ".layers.2." in key]:
        tensors[key.replace(".layers.2.", ".layers.3.")] = tensors[key]
    tensors["model.layers.3.enorm.weight"] = jnp.ones(64)
    save_file(tensors, tmp_path / "more" / "model.safetensors")
    again, _ = load_pretrained(tmp_path / "more")
    assert_same(state(again), state(model))
    (record,) = caplog.records
    assert "weights are not read, which predict further tokens (model.layers.3.*)" in record.message
    edit(tmp_path / "more", num_nextn_predict_layers=0)
    refused(tmp_path / "more", r"left over \(model.layers.3")
    edit(tmp_path / "more", num_nextn_predict_layers=10**9)
    refused(
        tmp_path / "more", "num_nextn_predict_layers is 1000000000; expected a number of layers"
    )


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"use_sliding_window": False}, [None] * 3),
        ({"use_sliding_window": True, "max_window_layers": 1}, [None, 4, 4]),
        (
            {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            [4, None, None],
        ),
        ({"layer_types": ["sliding_attention"] * 3, "max_window_layers": 3}, [4] * 3),
        # As long as the context: it hides nothing.
        ({"sliding_window": 256}, [None] * 3),
    ],
)
def test_windows_are_read_for_each_layer(changes, layers):
    data = json.loads((GOLDENS / "qwen2" / "config.json").read_text())
    del data["layer_types"]
    data |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, **changes}
    _, config = read_config(data)
    assert [config.window_of(i) for i in range(3)] == layers
    kind, written = write_config(config)
    assert kind == "qwen2" and read_config(written)[1] == config


def test_layers_of_another_kind_are_refused():
    data = json.loads((GOLDENS / "mistral" / "config.json").read_text())
    with pytest.raises(UserError, match="layer_types is .*; expected a list with one of full"):
        read_config({**data, "layer_types": ["chunked_attention"] * 3})


def test_switches_that_no_type_has_together_are_not_written():
    config = make_config("standard", "tiny", qk_norm="after_rotation", window=5)
    with pytest.raises(UserError, match="no published form: no model type has all of its switches"):
        write_config(config)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])
def test_stacked_layers_are_read_and_written_as_single_ones_are(name, tmp_path):
    model, _ = golden(name)
    stacked, _ = load_pretrained(GOLDENS / name, scan_layers=True)
    assert isinstance(stacked.blocks, StackedLayers)
    assert_same(by_name(state(stacked)), by_name(state(model)))
    save_pretrained(stacked, tmp_path / "written")
    written, expected = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "written", GOLDENS / name)
    )
    assert_same(written, expected)


@pytest.mark.parametrize("name", ["mixtral", "jamba", "deepseek_v2", "hunyuan_large"])
def test_experts_of_one_layer_may_be_one_tensor(name, tmp_path):
    """As transformers has them in memory: gate before up, all experts on a leading axis."""
    model, _ = golden(name)
    shutil.copytree(GOLDENS / name, tmp_path / "fused")
    tensors = load_file(GOLDENS / name / "model.safetensors")
    names = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    experts = sorted({key.split("experts.")[0] for key in tensors if ".experts." in key})
    for key in experts:
        stacks = []
        for part in names:
            count = sum(k.startswith(f"{key}experts.") and f".{part}." in k for k in tensors)
            found = [tensors.pop(f"{key}experts.{e}.{part}.weight") for e in range(count)]
            stacks.append(jnp.stack(found))
        new = key
        if name == "mixtral":
            new = key.replace("block_sparse_moe", "mlp")
            tensors[f"{new}gate.weight"] = tensors.pop(f"{key}gate.weight")
        tensors[f"{new}experts.gate_up_proj"] = jnp.concatenate(stacks[:2], axis=1)
        tensors[f"{new}experts.down_proj"] = stacks[2]
    assert experts
    save_file(tensors, tmp_path / "fused" / "model.safetensors")
    assert_same(state(load_pretrained(tmp_path / "fused")[0]), state(model))


def test_shards_are_read_by_their_index_and_written_with_one(tmp_path):
    model, config = golden("mixtral")
    save_pretrained(model, tmp_path / "shards", max_shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    sizes = [(tmp_path / "shards" / file).stat().st_size for file in files]
    assert max(sizes) < 110_000
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in jax.tree.leaves(state(model)))
    again, config_again = load_pretrained(tmp_path / "shards")
    assert config_again == config
    assert_same(state(again), state(model))


def test_half_precision_is_kept_as_it_is_stored(tmp_path):
    config = make_config("deepseek_v2", "tiny", param_dtype="bfloat16")
    model = jax.jit(lambda: make_model(config, rngs=nnx.Rngs(0)))()
    save_pretrained(model, tmp_path / "half")
    again, _ = load_pretrained(tmp_path / "half")
    assert_same(state(again), state(model))
    upcast, config = load_pretrained(tmp_path / "half", dtype="bfloat16", param_dtype="float32")
    assert (config.dtype, config.param_dtype) == ("bfloat16", "float32")
    jax.tree.map(lambda a, b: assert_same(a, b.astype(jnp.float32)), state(upcast), state(model))


# --- What does not fit


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDENS / "mixtral", tmp_path / "model"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1_000


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def test_keys_that_are_missing_or_left_over_are_named(folder):
    change_weights(folder, lambda t: t.update({"model.extra.weight": t.pop(EXPERT)}))
    refused(folder, rf"1 missing \({EXPERT}\); 1 left over \(model.extra.weight\)")
    edit(folder, num_local_experts=2)
    refused(folder, r"18 left over \(.*, \.\.\)")
    change_weights(folder, lambda t: t.update({"a\n\x1b[31m" + "b" * 999: jnp.ones(1)}))
    refused(folder, r"left over \('a\\n\\x1b\[31mbbb.*\.\.\.")


def test_keys_of_another_shape_are_named(folder):
    change_weights(folder, lambda t: t.update({EXPERT: t[EXPERT].T}))
    refused(folder, rf"{EXPERT} is \[64, 48\]; config.json makes it \[48, 64\]")


def test_a_weight_in_two_files_is_refused(folder):
    save_file({EXPERT: jnp.zeros((48, 64))}, folder / "model-2.safetensors")
    refused(folder, "w1.weight is in two files; expected one")


def test_constants_beside_the_weights_are_skipped(folder):
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda t: t.update({key: jnp.ones(8)}))
    load_pretrained(folder)


def test_weights_of_another_dtype_are_named(folder):
    change_weights(folder, lambda t: t.update({EXPERT: t[EXPERT].astype(jnp.int8)}))
    refused(folder, f"{EXPERT} is I8; expected one of F32, BF16, F16")


def dtypes(model: Any) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(state(model))}


def test_weights_are_rounded_only_if_asked_and_the_log_says_so(folder, caplog):
    edit(folder, dtype="bfloat16")
    with caplog.at_level("INFO", "slam_jax"):
        stored, config = load_pretrained(folder)
        assert dtypes(stored) == {"float32"} == {config.param_dtype} and not caplog.messages
        rounded, config = load_pretrained(folder, param_dtype="bfloat16")
    assert dtypes(rounded) == {"bfloat16"} == {config.param_dtype}
    (message,) = caplog.messages
    assert "weights are cast: 60 from F32 to bfloat16" in message


def test_more_than_the_files_can_hold_is_refused_before_it_is_built(folder):
    edit(folder, num_hidden_layers=400, num_local_experts=4_000)
    refused(folder, "config.json has num_layers 400, but there are only")
    edit(folder, num_hidden_layers=3, num_local_experts=4_000)
    refused(folder, "config.json has num_experts 4,000, but there are only")


def test_an_index_may_name_files_of_the_folder_alone(folder, tmp_path):
    shutil.copy(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), "no such"):
        index = {"weight_map": {EXPERT: name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, "is not a file of the folder")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "b" * 300}})
    )
    refused(folder, "is not a file of the folder")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(folder, "no weight_map")


YARN_4 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": fields}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; expected one of llama, mistral, qwen2"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected a whole number"),
        ({"hidden_size": None}, "hidden_size is None; expected a whole number"),
        ({"hidden_size": True}, "hidden_size is True; expected a whole number"),
        ({"num_hidden_layers": [3, 4]}, r"num_hidden_layers is \[3, 4\]; expected a whole number"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000; expected at most 512"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; expected a number"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu' or 'swish', which"),
        ({"sliding_window": 4096}, "sliding_window is 4096; expected None"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected float32, bfloat16"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*; expected a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a number"),
        ({"head_dim": 0}, "head_dim is 0; expected at least 1"),
        (rope(rope_type="su"), "rope_parameters.rope_type is 'su'; expected default, linear"),
        (rope(rope_type="llama3"), "rope_parameters.factor is None; expected a number"),
        (rope(rope_type="dynamic", factor=2.0, alpha=9.0), "alpha is 9.0; expected nothing: it"),
        (rope(rope_type="longrope", short_factor=[1.0]), "long_factor is None; expected a list"),
        (rope(rope_type="longrope", short_factor=[1.0], long_factor=[2.0]), "factors is 1; expect"),
        (
            rope(rope_type="longrope", short_factor=[10**400], long_factor=[2.0]),
            r"short_factor is \[1000.*; expected another value",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; expected nothing"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types is .*; expected nothing"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config.quant_method is None; expected .fp8",
        ),
        (rope(rope_theta="x"), "rope_parameters.rope_theta is 'x'; expected a number"),
        (rope(rope_theta=1.0), "rope.base is 1.0; expected above 1"),
        (rope(rope_theta=1e4, partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; expected"),
        (rope(full_attention={"rope_theta": 1e4}), "full_attention is .*; expected nothing"),
        (rope(rope_type="yarn"), "rope_parameters.factor is None; expected a number"),
        (rope(rope_type="yarn", factor=4.0), "original_max_position_embeddings is None; expected"),
        (rope(**YARN_4, beta_fast=0), "yarn.beta_fast is 0.0; expected a number above 0"),
        (rope(**YARN_4, truncate=False), "truncate is False; expected nothing: it is not built"),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters beside rope_scaling with other"),
        ({"rope_parameters": 3}, "rope_parameters is 3; expected a group of fields"),
        ({"num_attention_heads": 5}, "num_kv_heads is 2; expected a divisor of num_heads=5"),
    ],
)
def test_a_configuration_that_is_not_understood_is_named(folder, changes, message):
    edit(folder, **changes)
    refused(folder, message)


def test_files_that_are_no_weights_are_named(folder, tmp_path):
    refused(tmp_path / "nowhere", "config.json: No such file or directory; expected the folder of")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    huge = struct.pack("<Q", 1 << 60)
    for damaged in (b"", b"\x80\x04pickle", content[:1_000], content[:-7], huge + content[8:]):
        weights.write_bytes(damaged)
        refused(folder, "model.safetensors: .*; expected a safetensors file")
    weights.unlink()
    refused(folder, r"no \*.safetensors")
    for text in ("{", "[" * 100_000, "\xff", "3", " " * (1 << 21)):
        (folder / "config.json").write_text(text, encoding="latin-1")
        refused(folder, "config.json: ")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    refused(folder, "config.json: expected a file")


def test_a_model_that_their_configuration_cannot_express_is_not_saved(tmp_path):
    """It would come back as another model."""
    config = make_config("standard", "tiny", rope=Rope(interleaved=True))
    with pytest.raises(UserError, match="llama cannot express it"):
        save_pretrained(make_model(config, rngs=nnx.Rngs(0)), tmp_path / "turned")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_nothing_is_left_behind(folder, monkeypatch, tmp_path):
    model, _ = golden("mixtral")
    with pytest.raises(UserError, match="it is not empty; give a new or an empty folder"):
        save_pretrained(model, folder)
    with pytest.raises(UserError, match="a SlamV6Config has no published form; expected Deepseek"):
        config = make_config("slam_v6", "tiny")
        save_pretrained(make_model(config, rngs=nnx.Rngs(0)), tmp_path / "v6")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slam_jax.interop.pretrained.save_file", fail)
    with pytest.raises(UserError, match="new: could not be written .No space left on device."):
        save_pretrained(model, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# --- Configurations


YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}


def test_yarn_is_read_in_both_spellings():
    data = json.loads((GOLDENS / "deepseek_v2" / "config.json").read_text())
    del data["rope_parameters"]
    expected = Rope(interleaved=True, yarn=Yarn(40.0, 4_096, mscale=0.707, mscale_all_dim=0.707))
    for spelled in (
        {"rope_theta": 10000, "rope_scaling": YARN},
        {"rope_parameters": {"rope_theta": 10000, **YARN, "rope_type": "yarn"}},
    ):
        assert read_config({**data, **spelled})[1].rope == expected
    assert expected.magnitude == 1.0
    assert expected.score_scale == pytest.approx(1.2608**2, rel=1e-4)
    assert Rope(yarn=Yarn(40.0, 4_096)).magnitude == pytest.approx(1.3689, rel=1e-4)


def test_equal_spellings_and_a_byte_order_mark_are_read(tmp_path):
    shutil.copytree(GOLDENS / "llama_3_rope", tmp_path / "both")
    path = tmp_path / "both" / "config.json"
    data = json.loads(path.read_text())
    parameters = dict(data["rope_parameters"])
    theta, kind = parameters.pop("rope_theta"), parameters.pop("rope_type")
    data |= {"rope_theta": theta, "rope_scaling": {**parameters, "type": kind}}
    path.write_text(json.dumps(data), encoding="utf-8-sig")
    assert load_pretrained(tmp_path / "both")[1] == golden("llama_3_rope")[1]


def test_what_a_configuration_leaves_out_is_as_its_publisher_has_it():
    sizes = {"vocab_size": 10, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8}
    data = {**sizes, "num_attention_heads": 8}
    mixtral, llama, jamba = (
        read_config({**data, "model_type": kind})[1] for kind in ("mixtral", "llama", "jamba")
    )
    assert (mixtral.rope, mixtral.norm_epsilon) == (Rope(1e6), 1e-5)
    assert (mixtral.num_experts, mixtral.num_experts_per_token) == (8, 2)
    assert (llama.rope, llama.norm_epsilon, llama.num_kv_heads) == (Rope(1e4), 1e-6, None)
    assert (jamba.num_experts, jamba.attention_period, jamba.dt_rank) == (16, 8, None)
    assert jamba.num_kv_heads == 8
    deepseek = {**data, "moe_intermediate_size": 8, "model_type": "deepseek_v3"}
    _, found = read_config(deepseek)
    assert (found.q_lora_rank, found.num_experts, found.num_groups, found.top_groups) == (
        *(1_536, 256, 8, 4),
    )
    assert (found.renormalize, found.routed_scale, found.num_shared_experts) == (True, 2.5, 1)
    assert read_config({**deepseek, "q_lora_rank": None})[1].q_lora_rank is None
    one = read_config({**data, "model_type": "jamba", "num_experts": 1, "num_experts_per_tok": 2})
    assert one[1].num_experts_per_token == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_a_configuration_comes_back_as_it_was(kind):
    name = next(name for name, s in SYSTEMS.items() if s.config is FORMATS[kind].config)
    for preset in SYSTEMS[name].presets:
        config = make_config(name, preset, dtype="float32", **SWITCHES.get(kind, {}))
        found_kind, found = read_config(json.loads(json.dumps(write_config(config)[1])))
        written, expected = {**vars(found), "dtype": "float32"}, dict(vars(config))
        # Fields that their configurations do not have, or that have no effect here.
        silent = ["device_balance_loss", "communication_balance_loss"]
        silent += ["balance_loss"] if kind in ("hunyuan", "hunyuan_v1_moe") else []
        if kind == "deepseek_v2" and config.top_groups == config.num_groups:
            silent.append("num_groups")
        silent += [f for f in ("num_kv_heads", "head_dim") if expected.get(f) is None]
        for field in silent:
            written.pop(field, None)
            expected.pop(field, None)
        assert (found_kind, written) == (kind, expected)
