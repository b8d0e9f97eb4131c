"""Published vision towers: each gives its publisher's states, and is written back to the last bit.

tests/test_vision_peers.py compares new random towers with the publishers' own code.
"""

import dataclasses
import functools
import json
import logging
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
from PIL import Image
from safetensors.flax import load_file, save_file

from slam_jax.errors import UserError
from slam_jax.interop import load_preprocessing, load_vision, save_vision
from slam_jax.interop.vision_formats import VISION_FORMATS, read_vision_config
from slam_jax.vision_models import (
    Preprocessing,
    VisionConfig,
    VisionTower,
    preprocess,
    published_preprocessing,
)
from slam_jax.vision_models.tower import bicubic_weights

GOLDENS = Path(__file__).parent / "goldens" / "vision"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
PICTURES = sorted(path.parent.name for path in GOLDENS.glob("*/prepared.npy"))

each_golden = pytest.mark.parametrize("name", NAMES)


def state(model: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(model))


@functools.cache
def golden(name: str) -> tuple[VisionTower, VisionConfig]:
    """The tower of a fixture and its configuration, read once for all tests."""
    return load_vision(GOLDENS / name)


def stored(name: str, what: str) -> np.ndarray:
    return np.load(GOLDENS / name / f"{what}.npy")


def pixels_of(name: str) -> np.ndarray:
    return stored(name, "pixels").transpose(0, 2, 3, 1)


@jax.jit
def states(tower: VisionTower, pixels: jax.Array) -> tuple[jax.Array, ...]:
    """The states of the last layer and of the one before it, and the patches of that one."""
    return tower(pixels), tower.hidden_state(pixels, 1), tower.patches(pixels, -2)


def close(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-4 * max(1, expected.std()), rtol=0)


@each_golden
def test_states_are_the_publishers(name):
    tower, config = golden(name)
    last, between, patches = states(tower, pixels_of(name))
    assert stored(name, "hidden").std() > 0.5 and config.dtype == "float32"
    close(last, stored(name, "hidden"))
    close(between, stored(name, "between"))
    close(patches, stored(name, "between")[:, -16:])


@each_golden
def test_positions_are_interpolated_and_whole_patches_taken_as_the_publishers_do(name):
    """An image of 43 x 24 pixels has 5 x 3 patches of 8; the positions are for 4 x 4."""
    tower, config = golden(name)
    pixels = np.tile(pixels_of(name)[:1], (1, 2, 1, 1))[:, :43, :24]
    last = jax.jit(lambda tower, x: tower(x))(tower, pixels)
    close(last, stored(name, "hidden_43x24"))
    assert last.shape[1] == 15 + config.num_prefix_tokens


def test_patches_are_the_tokens_after_the_class_token_and_the_registers():
    tower, _ = golden("registers")
    both = jax.jit(lambda tower, x: (tower(x), tower.patches(x)))
    last, patches = both(tower, pixels_of("registers"))
    assert last.shape == (2, 1 + 3 + 16, 24)
    np.testing.assert_array_equal(patches, last[:, 4:])
    with pytest.raises(UserError, match="layer 3: expected -3 to 2"):
        tower.patches(pixels_of("registers"), 3)


@pytest.mark.parametrize("new", [1, 3, 7, 20])
@pytest.mark.parametrize("antialias", [False, True])
def test_interpolation_keeps_constants_and_does_nothing_at_the_same_size(new, antialias):
    weights = bicubic_weights(new, 7, antialias=antialias)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)
    if new == 7:
        np.testing.assert_allclose(weights, np.eye(7), atol=1e-6)


@pytest.mark.parametrize("name", ["registers", "clip_vision"])
def test_stacked_blocks_give_the_same_states(name):
    stacked, _ = load_vision(GOLDENS / name, scan_layers=True)
    assert "blocks/0:2" in {"/".join(map(str, path[:2])) for path in flatten_dict(state(stacked))}
    expected = states(golden(name)[0], pixels_of(name))
    for found, y in zip(states(stacked, pixels_of(name)), expected, strict=True):
        np.testing.assert_allclose(found, y, atol=1e-5)


@pytest.mark.parametrize(("name", "remat"), [("registers", None), ("clip_vision", "maps")])
def test_gradients_reach_every_parameter_of_the_forward_pass(name, remat):
    config = dataclasses.replace(golden(name)[1], remat=remat)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0))))
    weight = np.random.default_rng(0).normal(size=stored(name, "hidden").shape)

    @jax.jit
    @jax.grad
    def gradient(params: Any) -> jax.Array:
        return (nnx.merge(graphdef, params)(pixels_of(name)) * weight).sum()

    found: Any = flatten_dict(nnx.to_pure_dict(gradient(nnx.state(golden(name)[0]))))
    for path, leaf in found.items():
        # The bias of the keys adds the same to all scores of a query. CLIP's norm is not used here.
        none = path[-2:] == ("key", "bias") or (name == "clip_vision" and path[0] == "norm")
        largest = np.abs(leaf).max(axis=-1)  # of each token, input, head
        assert np.isfinite(leaf).all() and (largest.min() > 1e-3) != none, path


def test_half_precision(tmp_path):
    tower, _ = load_vision(GOLDENS / "vit", dtype="bfloat16", param_dtype="bfloat16")
    last, between, _ = states(tower, pixels_of("vit"))
    assert last.dtype == between.dtype == jnp.bfloat16
    np.testing.assert_allclose(last.astype(np.float32), stored("vit", "hidden"), atol=0.1)
    save_vision(tower, tmp_path / "half")
    again, config = load_vision(tmp_path / "half")
    assert config.param_dtype == "bfloat16"
    assert_same(state(again), state(tower))


# --- Folders


@each_golden
def test_what_is_saved_is_what_was_read_to_the_last_bit(name, tmp_path):
    tower, config = golden(name)
    save_vision(tower, tmp_path / "copy", preprocessing=load_preprocessing(GOLDENS / name))
    again, config_again = load_vision(tmp_path / "copy")
    assert config_again == config
    assert_same(state(again), state(tower))
    assert load_preprocessing(tmp_path / "copy") == load_preprocessing(GOLDENS / name)
    theirs = load_file(GOLDENS / name / "model.safetensors")
    ours = load_file(tmp_path / "copy" / "model.safetensors")
    for key in theirs.keys() - ours.keys():
        assert key == "embeddings.mask_token" or key.startswith("head."), key
    assert_same(ours, {key: theirs[key] for key in ours})
    configs = (
        json.loads((f / "config.json").read_text()) for f in (tmp_path / "copy", GOLDENS / name)
    )
    written, read = configs
    changed = {key for key in written.keys() & read.keys() if written[key] != read[key]}
    assert changed <= {"use_mask_token", "vision_use_head"}


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDENS / "clip_vision", tmp_path / "tower"))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")


def make_whole(folder: Path, kind: str) -> None:
    """Into the folder of a whole model, as its publisher saves it."""
    inner = json.loads((folder / "config.json").read_text())
    whole = {"model_type": kind, "text_config": {"hidden_size": 8}, "vision_config": inner}
    (folder / "config.json").write_text(json.dumps(whole))
    others = {
        "text_model.encoder.layers.0.mlp.fc1.weight": jnp.ones((2, 2)),
        "text_projection.weight": jnp.ones((2, 2)),
        "logit_scale": jnp.ones(()),
        "vision_model.embeddings.position_ids": jnp.arange(3),
    }
    change_weights(folder, lambda t: {f"vision_model.{k}": v for k, v in t.items()} | others)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_of_a_whole_model_the_vision_tower_is_read_and_one_line_says_so(kind, tmp_path, caplog):
    whole = Path(shutil.copytree(GOLDENS / f"{kind}_vision", tmp_path / "whole"))
    make_whole(whole, kind)
    with caplog.at_level(logging.WARNING, "slam_jax"):
        tower, config = load_vision(whole)
    assert config == golden(f"{kind}_vision")[1]
    assert_same(state(tower), state(golden(f"{kind}_vision")[0]))
    (message,) = caplog.messages
    assert "only the vision tower is read" in message and "the text tower" in message
    assert ("the pooling head" in message) == (kind == "siglip")


def test_nothing_is_said_where_nothing_is_skipped(caplog):
    load_vision(GOLDENS / "dinov2")
    assert not caplog.messages


def test_a_whole_model_may_leave_out_what_its_publisher_has_by_default():
    config = read_vision_config({"model_type": "siglip", "vision_config": {}, "dtype": "bfloat16"})
    assert (config.embed_dim, config.num_layers, config.patch_size) == (768, 12, 16)
    assert (config.activation, config.param_dtype) == ("gelu_pytorch_tanh", "bfloat16")
    clip = {"model_type": "clip", "vision_config": {"hidden_size": 24, "torch_dtype": None}}
    assert read_vision_config({**clip, "vision_config_dict": None}).embed_dim == 24
    old = {**clip, "vision_config_dict": {"hidden_size": 48}}
    assert read_vision_config(old).embed_dim == 48
    for kind, expected in {
        "vit": ("gelu", 16, 1e-12, 3_072, 0),
        "dinov2": ("gelu", 14, 1e-6, 3_072, 0),
        "dinov2_with_registers": ("gelu", 16, 1e-6, 3_072, 4),
        "clip_vision_model": ("quick_gelu", 32, 1e-5, 3_072, 0),
    }.items():
        c = read_vision_config({"model_type": kind})
        found = (c.activation, c.patch_size, c.norm_epsilon, c.mlp_dim, c.num_registers)
        assert found == expected


def test_gated_mlps_have_two_thirds_of_the_hidden_units():
    """They are rounded up to a multiple of 8. DINOv2 giant is 1,536 wide and has 4,096."""
    giant = {"model_type": "dinov2", "hidden_size": 1_536, "num_attention_heads": 24}
    assert read_vision_config({**giant, "use_swiglu_ffn": True}).hidden_dim == 4_096
    assert read_vision_config(giant).hidden_dim == 6_144
    small = {"hidden_size": 26, "mlp_ratio": 2, "num_attention_heads": 2, "use_swiglu_ffn": True}
    assert read_vision_config({**giant, **small}).hidden_dim == 40


# --- What does not fit


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_vision(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1_000


KEY = "encoder.layers.1.mlp.fc1.weight"


def test_weights_that_do_not_fit_are_named(folder):
    change_weights(folder, lambda t: t.update({"extra.weight": t.pop(KEY)}))
    refused(folder, rf"1 missing \({KEY}\); 1 left over \(extra.weight\)")
    change_weights(folder, lambda t: t.update({KEY: t.pop("extra.weight").T}))
    refused(folder, rf"{KEY} is \[48, 96\]; config.json makes it \[96, 48\]")
    change_weights(folder, lambda t: t.update({KEY: t[KEY].T.astype(jnp.int8)}))
    refused(folder, f"{KEY} is I8; expected one of F32, BF16, F16")


def test_sizes_that_the_files_do_not_have_are_refused_before_anything_is_built(folder):
    edit(folder, num_hidden_layers=400)
    refused(folder, "config.json has num_layers 400, but there are only 39 weights")
    edit(folder, num_hidden_layers=2, image_size=16_384)
    refused(folder, r"position_embedding.weight is \[17, 48\]; .* it \[4194305, 48\]")
    edit(folder, image_size=10**9)
    refused(folder, "image_size is 1000000000; expected at most 16,384")


def test_files_that_are_no_weights_are_named(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (b"", content[:1_000], struct.pack("<Q", 1 << 60) + content[8:]):
        weights.write_bytes(damaged)
        refused(folder, "model.safetensors: .*; expected a safetensors file")
    for text in ("{", "[" * 100_000, "3", "[]", " " * (1 << 21)):
        (folder / "config.json").write_text(text)
        refused(folder, "config.json: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; expected one of vit, dinov2"),
        ({"model_type": ["clip"]}, r"model_type is \['clip'\]"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected a whole number"),
        ({"image_size": [32, 40]}, r"image_size is \[32, 40\]; expected a whole number"),
        ({"image_size": 0}, "image_size is 0; expected at least 1"),
        ({"patch_size": 33}, "patch_size is 33; expected at most 32"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan; expected a number"),
        ({"layer_norm_eps": 0}, "norm_epsilon is 0.0; expected a number above 0"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; expected one of gelu, gelu_pytorch_tanh"),
        ({"hidden_act": ["gelu"]}, r"hidden_act is \['gelu'\]; expected one of gelu"),
        ({"num_channels": 4}, "num_channels is 4; expected 3, which is all that is built"),
        ({"num_attention_heads": 5}, "embed_dim is 48; expected a multiple of num_heads=5"),
        ({"head_dim": 8}, "head_dim is 8; expected nothing: it is not understood"),
        ({"quantization_config": {"bits": 8}}, "quantization_config is .*; expected nothing"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads is .*; expected {}"),
        ({"use_swiglu_ffn": True}, "use_swiglu_ffn is True; expected nothing"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected float32"),
        (
            {"model_type": "clip", "vision_config": 3},
            "hidden_act is 'quick_gelu'; expected nothing",
        ),
        ({"a" * 999: 1}, r"a\.\.\. is 1; expected nothing"),
    ],
)
def test_a_configuration_that_is_not_understood_is_named(folder, changes, message):
    edit(folder, **changes)
    refused(folder, message)


def test_the_fields_of_a_tower_inside_a_whole_model_are_checked(folder):
    make_whole(folder, "clip")
    whole = json.loads((folder / "config.json").read_text())
    edit(folder, vision_config={**whole["vision_config"], "rope_theta": 100.0})
    refused(folder, "vision_config.rope_theta is 100.0; expected nothing")
    edit(folder, vision_config={**whole["vision_config"], "model_type": "vit"})
    refused(folder, "vision_config.model_type is 'vit'; expected clip_vision_model")
    edit(folder, vision_config=[1])
    refused(folder, r"vision_config is \[1\]; expected a group of fields")
    edit(folder, vision_config=whole["vision_config"], quantization_config={})
    refused(folder, "quantization_config is {}; expected nothing")


@pytest.mark.parametrize("kind", VISION_FORMATS)
def test_any_value_of_any_field_is_read_or_refused_in_a_line(kind):
    odd = [-1, 0, 1, 2**70, 10**400, 0.5, float("inf"), True, "x", [], [1, 1], {}, {"a": [1]}]
    for field in VISION_FORMATS[kind].fields:
        for value in odd:
            try:
                read_vision_config({"model_type": kind, field.key: value})
            except UserError as error:
                assert "\n" not in str(error)


def test_a_tower_that_their_configuration_cannot_express_is_not_saved(tmp_path):
    config = dataclasses.replace(golden("vit")[1], swiglu=True)
    tower = nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="swiglu is True; vit cannot express it, and would read Fa"):
        save_vision(tower, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_images_that_are_none_are_refused():
    tower, _ = golden("vit")
    with pytest.raises(UserError, match="pixels are uint8.1, 8, 8, 3.; expected normalised floats"):
        tower(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="float32.8, 8, 3.; expected normalised floats"):
        tower(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(UserError, match="image of 7 x 99 pixels; expected at least one patch of 8"):
        tower(np.zeros((1, 7, 99, 3), np.float32))


# --- Pictures


def picture() -> np.ndarray:
    y, x = np.mgrid[:37, :50]
    channels = (x * 5 + y * 3) % 256, (x * y) % 256, (255 - x * 4 + y * 7) % 256
    return np.stack(channels, -1).astype(np.uint8)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_prepared_as_the_publishers_do(name):
    how = load_preprocessing(GOLDENS / name)
    found = preprocess(picture(), how)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, stored(name, "prepared"), atol=1e-5)
    np.testing.assert_array_equal(found, preprocess(Image.fromarray(picture()), how))


def test_transparent_and_grey_pictures_become_rgb():
    how = Preprocessing(size=None, mean=(0, 0, 0), std=(1, 1, 1))
    clear = np.zeros((4, 4, 4), np.uint8)
    np.testing.assert_array_equal(preprocess(clear, how), 1.0)
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    np.testing.assert_allclose(preprocess(grey, how), np.stack([grey] * 3, -1) / 255, rtol=1e-6)


def test_a_crop_beyond_the_picture_is_black():
    how = Preprocessing(size=None, crop=(3, 6), mean=(0, 0, 0), std=(1, 1, 1))
    found = preprocess(np.full((5, 3, 3), 255, np.uint8), how)[..., 0]
    np.testing.assert_array_equal(found, [[0, 0, 1, 1, 1, 0]] * 3)


def test_a_folder_without_preprocessing_has_its_publishers(folder):
    (folder / "preprocessor_config.json").unlink()
    how = load_preprocessing(folder)
    assert (how.size, how.crop, how.mean[0]) == (32, (32, 32), 0.48145466)
    config = golden("dinov2")[1]
    assert published_preprocessing(config).size == 256


def test_numbers_for_sizes_are_read_as_older_files_mean_them(folder, tmp_path):
    old = {"size": 20, "crop_size": 16, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**old, "do_center_crop": True}))
    how = load_preprocessing(folder)
    assert (how.size, how.crop, how.mean) == (20, (16, 16), (0.1, 0.2, 0.3))
    vit = Path(shutil.copytree(GOLDENS / "vit", tmp_path / "vit"))
    (vit / "preprocessor_config.json").write_text(json.dumps(old))
    assert (load_preprocessing(vit).size, load_preprocessing(vit).crop) == ((20, 20), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"longest_edge": 9}}, "preprocessor_config.json: size is .*; expected a number"),
        ({"size": 10**9}, "size is 1000000000; expected at most 8,192"),
        ({"size": {"height": 9, "width": "9"}}, "size.width is '9'; expected a whole number"),
        ({"crop_size": {"shortest_edge": 9}}, "crop_size is .*; expected a number"),
        ({"image_mean": None}, "image_mean is None; expected three numbers"),
        ({"image_mean": [0.5] * 4}, "image_mean is .*; expected three numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, r"std is \(0.5, 0.0, 0.5\); expected numbers above 0"),
        ({"image_std": [0.5, float("nan"), 0.5]}, "image_std.1 is nan; expected a number"),
        ({"rescale_factor": -1}, "scale is -1.0; expected a number above 0"),
        ({"resample": 9}, "resample is 9; expected a filter of Pillow"),
        ({"do_resize": 1}, "do_resize is 1; expected true or false"),
        ({"do_pad": True}, "do_pad is True; expected nothing: it is not understood"),
    ],
)
def test_preprocessing_that_is_not_understood_is_named(folder, changes, message):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        load_preprocessing(folder)


def test_pictures_that_are_none_are_refused():
    how = Preprocessing(size=224)
    for wrong in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.uint8(3)):
        with pytest.raises(UserError, match="is no picture; expected"):
            preprocess(np.asarray(wrong), how)
    with pytest.raises(UserError, match="1 x 1300 pixels would become 224 x 291,200"):
        preprocess(np.zeros((1, 1_300, 3), np.uint8), how)
