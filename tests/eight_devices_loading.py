"""What test_loading.py runs in a process of its own, with eight virtual devices."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from slam_jax.errors import UserError
from slam_jax.interop import load_pretrained, load_vision
from slam_jax.training.checkpoint.trees import by_name
from slam_jax.training.mesh import MeshConfig, make_mesh
from slam_jax.training.sharding import shardings_of, use_mesh

GOLDENS = Path(__file__).parent / "goldens"


def state(model: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(model))


def mesh_of(**sizes: Any) -> Any:
    return make_mesh(MeshConfig(**{"data": 1, "process": 1, **sizes}))


def assert_placed(found: Any, expected: Any, mesh: Any) -> None:
    """Equal to the last bit, and each device has the part of each parameter that the rules say."""
    wanted = shardings_of(found, mesh)
    assert jax.tree.map(lambda x: x.sharding, found) == wanted
    assert any("fsdp" in sharding.spec for sharding in jax.tree.leaves(wanted))
    found, expected = by_name(found), by_name(expected)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == expected[name].dtype
        np.testing.assert_array_equal(x, expected[name], name)


@jax.jit
def logits(model: Any, tokens: Any) -> Any:
    return model(tokens).logits


@pytest.mark.parametrize(
    ("name", "sizes", "options"),
    [
        ("deepseek_v3", dict(fsdp=4, tensor=2), {}),
        ("mixtral", dict(fsdp=2, tensor=4), dict(scan_layers=True, param_dtype="bfloat16")),
        ("jamba", dict(data=2, fsdp=2, tensor=2), {}),
        ("qwen2", dict(data=2, fsdp=4), {}),
    ],
)
def test_a_sharded_model_is_the_plain_one(name, sizes, options):
    mesh = mesh_of(**sizes)
    plain, config = load_pretrained(GOLDENS / name, **options)
    model, again = load_pretrained(GOLDENS / name, mesh=mesh, **options)
    assert again == config
    assert_placed(state(model), state(plain), mesh)
    tokens = np.load(GOLDENS / name / "tokens.npy")
    expected = logits(plain, tokens)
    with use_mesh(mesh):
        np.testing.assert_allclose(logits(model, tokens), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["vit", "registers", "clip_vision"])
def test_a_sharded_tower_is_the_plain_one(name):
    folder = GOLDENS / "vision" / name
    mesh = mesh_of(fsdp=4, tensor=2)
    plain, _ = load_vision(folder)
    tower, config = load_vision(folder, mesh=mesh, scan_layers=True)
    assert_placed(state(tower), state(plain), mesh)
    pixels = np.zeros((8, config.image_size, config.image_size, 3), np.float32)
    run = jax.jit(lambda tower, pixels: tower(pixels))
    expected = run(plain, pixels)
    with use_mesh(mesh):
        np.testing.assert_allclose(run(tower, pixels), expected, atol=2e-5)


def test_nan_is_found_in_every_part(tmp_path):
    tensors = load_file(GOLDENS / "llama" / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDENS / "llama" / "config.json").read_text())
    key = "model.layers.0.mlp.down_proj.weight"
    for place in ((0, 0), (-1, -1)):
        x = tensors[key].copy()
        x[place] = np.nan
        save_file({**tensors, key: x}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"{key} has NaN"):
            load_pretrained(tmp_path, mesh=mesh_of(fsdp=8))
