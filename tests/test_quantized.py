"""Weights of fewer bits: the numbers they stand for, the models that have them, and their files."""

import dataclasses
import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import write_language_model
from flax import nnx
from helpers import assert_same
from safetensors.numpy import load_file

import slam_jax
from slam_jax.errors import ConfigError, InputError
from slam_jax.interop import load_pretrained
from slam_jax.kernels import row_product
from slam_jax.kernels.backend import for_accelerators
from slam_jax.language_models import SYSTEMS, make_config, make_model
from slam_jax.layers.embedding import Embedding
from slam_jax.layers.experts import MixtureOfExperts
from slam_jax.layers.linear import Linear
from slam_jax.layers.lora import add_lora
from slam_jax.layers.quantization import weights_of
from slam_jax.layers.quantized_array import dequantize, from_bits, to_bits, to_int8
from slam_jax.slam_v3 import SlamV3
from slam_jax.training.state import split_model

pytestmark = pytest.mark.release

slow = pytest.mark.slow
NARROW = ("bfloat16", "int8")
PROMPT = np.array([[5, 3, 8, 1, 9, 2], [4, 4, 7, 6, 2, 11]])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def close(x: Any, y: Any, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def test_int8_is_within_half_a_step_and_bfloat16_is_rounded():
    x = normal(6, 5, 4)
    x[:, 2, 1] = 0.0
    numbers, scale = to_int8(jnp.asarray(x), (0,))
    assert numbers.dtype == jnp.int8 and scale.shape == (5, 4)
    np.testing.assert_allclose(scale, np.abs(x).max(axis=0) / 127, rtol=1e-6)
    assert np.abs(numbers).max() == 127 and not numbers[:, 2, 1].any()
    error = np.abs(dequantize(numbers, scale, (0,)) - x)
    assert (error <= np.asarray(scale) * 0.5001).all()
    rounded = jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(from_bits(to_bits(jnp.asarray(x)), jnp.float32), rounded)


@pytest.mark.parametrize("kind", NARROW)
def test_products_of_few_rows_are_plain_products(kind):
    """In a loop as well, and each row has the same bits in every place and company."""
    kernel, table = normal(48, 20), normal(37, 32, seed=1)
    if kind == "int8":
        kernel, table = (to_int8(jnp.asarray(x), (0,))[0] for x in (kernel, table))
    else:
        kernel, table = (to_bits(jnp.asarray(x)) for x in (kernel, table))
    forms = (
        (row_product.quantized_product, kernel, False),
        (
            row_product.quantized_table_product,
            table,
            True,
        ),
    )
    for form, weights, transposed in forms:
        width = weights.shape[1 if transposed else 0]
        x, run = normal(8, width, seed=2), jax.jit(form)
        exact = from_bits(weights, jnp.float32)
        expected = x @ (exact.T if transposed else exact)
        found = run(x, weights)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_array_equal(run(x[::-1], weights), found[::-1])
        np.testing.assert_array_equal(run(np.stack([x[3]] * 8), weights), np.stack([found[3]] * 8))
        np.testing.assert_array_equal(run(x.reshape(2, 4, width), weights), found.reshape(2, 4, -1))
        with for_accelerators():
            plain = jax.jit(functools.partial(form))(x, weights)
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-4 * np.abs(expected).max())
        many = np.concatenate([x, x])
        np.testing.assert_allclose(
            run(many, weights)[8:], expected, rtol=1e-5, atol=1e-4 * np.abs(expected).max()
        )


@pytest.mark.parametrize("shapes", [(48, (3, 4)), ((6, 8), 5), (7, 5)])
def test_a_map_computes_with_its_weight(shapes):
    linear: Any = Linear(*shapes, use_bias=True, rngs=nnx.Rngs(0))
    linear.bias[...] += 0.5
    narrow, inputs = slam_jax.quantize(linear, "int8"), np.atleast_1d(shapes[0])
    x = jnp.asarray(normal(2, *inputs))
    assert linear.kernel.dtype == jnp.float32 and linear.scale is None
    expected = np.tensordot(x, narrow.weight, len(inputs)) + np.asarray(narrow.bias)
    close(narrow(x), expected)
    close(narrow(jnp.stack([x] * 8)), np.stack([expected] * 8))
    close(narrow.weight, linear.weight, 0.02)
    again = slam_jax.quantize(narrow, "float32")
    assert again.scale is None
    np.testing.assert_array_equal(again.kernel[...], narrow.weight)
    np.testing.assert_array_equal(slam_jax.quantize(again, "int8").kernel[...], narrow.kernel[...])


@pytest.mark.parametrize("kind", NARROW)
def test_a_table_is_read_by_rows_and_as_a_head(kind):
    table = Embedding(11, 32, rngs=nnx.Rngs(0))
    narrow = slam_jax.quantize(table, kind)
    exact = slam_jax.quantize(narrow, "float32").embedding[...]
    close(exact, table.embedding[...], 0.01)
    tokens = np.array([[3, 10], [0, 3]])
    np.testing.assert_array_equal(narrow(tokens), exact[tokens])
    x = jnp.asarray(normal(2, 2, 32))
    close(narrow.logits(x), x @ exact.T)


@pytest.mark.parametrize("tokens", [2, 9], ids=["few", "many"])
def test_experts_compute_with_their_dequantised_kernels(tokens):
    model = MixtureOfExperts(16, 32, 4, 2, rngs=nnx.Rngs(0))
    narrow = slam_jax.quantize(model, "int8")
    assert narrow.router.scores.kernel.dtype == jnp.float32
    assert narrow.experts.down.scale.shape == (4, 16)
    x = jnp.asarray(normal(tokens, 16))
    exact, run = slam_jax.quantize(narrow, "float32"), jax.jit(lambda model, x: model(x)[0])
    close(run(narrow, x), run(exact, x))
    close(exact.experts.up.kernel[...], model.experts.up.kernel[...], 0.02)


@functools.cache
def language_model(name: str, **changes: Any) -> Any:
    return make_model(make_config(name, "tiny", **changes), rngs=nnx.Rngs(1))


forward = jax.jit(lambda model, tokens: model(tokens).logits)
step = jax.jit(lambda model, tokens, cache: model.decode_step(tokens, cache, None))


@jax.jit
def prefill(model: Any, tokens: Any) -> Any:
    return model.prefill(tokens, model.init_cache(tokens.shape[:1], 8), None)


def check_model(model: Any, kind: str) -> None:
    narrow = slam_jax.quantize(model, kind)
    assert weights_of(narrow) == kind and weights_of(model) == "float32"
    expected = forward(slam_jax.quantize(narrow, "float32"), PROMPT)
    full = forward(narrow, PROMPT)
    close(full, expected, 1e-3)
    original = forward(model, PROMPT)
    assert 0 < np.std(full - original) < 0.1 * np.std(original)
    logits, cache = prefill(narrow, PROMPT[:, :4])
    close(logits, full[:, :4], 1e-3)
    for place in (4, 5):
        logits, cache = step(narrow, PROMPT[:, place], cache)
        close(logits, full[:, place], 1e-3)


def test_a_tied_model_computes_with_its_dequantised_weights():
    check_model(language_model("standard", tie_embeddings=True), "int8")


@slow
@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_computes_with_its_dequantised_weights(name, kind):
    check_model(language_model(name), kind)


@slow
def test_stacked_layers_are_quantised_one_by_one():
    stacked = slam_jax.quantize(language_model("standard", scan_layers=True), "int8")
    single = slam_jax.quantize(language_model("standard", scan_layers=False), "int8")
    close(forward(stacked, PROMPT), forward(single, PROMPT), 1e-3)
    check_model(language_model("standard", scan_layers=True), "int8")


@slow
def test_slam_v3_computes_with_its_dequantised_weights(build, make_inputs):
    model, inputs = build(), make_inputs()
    narrow = slam_jax.quantize(model, "int8")
    exact = slam_jax.quantize(narrow, "float32")
    tokens = np.random.default_rng(1).integers(0, 13, (2, 3, 5), np.int32)
    full = jax.jit(SlamV3.__call__)(narrow, tokens, inputs).logits
    close(full, jax.jit(SlamV3.__call__)(exact, tokens, inputs).logits, 1e-3)
    memory = jax.jit(SlamV3.encode)(narrow, inputs)
    cache = narrow.init_cache((2, 3), 5)
    logits, cache = jax.jit(SlamV3.prefill)(narrow, tokens[..., :4], cache, memory)
    close(logits, full[..., :4, :], 1e-3)
    logits, _ = jax.jit(SlamV3.decode_step)(narrow, tokens[..., 4], cache, memory)
    close(logits, full[..., 4, :], 1e-3)


@pytest.mark.parametrize("kind", NARROW)
def test_a_folder_of_slam_v3_gives_the_same_bits(tmp_path, kind):
    narrow = slam_jax.load("quickstart", weights=kind)
    slam_jax.save_pretrained(narrow, tmp_path / "out")
    again = slam_jax.load(tmp_path / "out")
    assert_same(split_model(again.model)[1], split_model(narrow.model)[1])
    with pytest.raises(ConfigError, match=f"dtype .* since the weights are {kind}"):
        slam_jax.save_pretrained(narrow, tmp_path / "other", dtype="float16")


def test_adapters_are_merged_first():
    model = make_model(make_config("standard", "tiny"), rngs=nnx.Rngs(1))
    add_lora(model, 2, 4.0, ("blocks/*/attention/query",), nnx.Rngs(2))
    query = model.blocks[0].attention.query
    query.lora_b[...] += 0.3
    narrow = slam_jax.quantize(model, "int8")
    found = narrow.blocks[0].attention.query
    assert found.lora_a is None and query.lora_a is not None
    close(found.weight, query.weight, 0.05)
    with pytest.raises(ConfigError, match="is quantised; adapt it before"):
        add_lora(narrow, 2, 4.0, ("blocks/*/attention/query",), nnx.Rngs(2))


def test_other_weights_are_refused():
    with pytest.raises(InputError, match="weights is 'int4'; expected one of float32"):
        slam_jax.quantize(language_model("standard"), "int4")


@pytest.mark.parametrize(
    ("kind", "scan"),
    [("bfloat16", False), ("int8", True), pytest.param("bfloat16", True, marks=slow)],
)
def test_a_folder_gives_the_same_bits(tmp_path, kind, scan):
    source = tmp_path / "source"
    write_language_model(source)
    loaded = slam_jax.load(source)
    model, _ = load_pretrained(source, scan_layers=scan)
    narrow = dataclasses.replace(loaded, model=slam_jax.quantize(model, kind))
    slam_jax.save_pretrained(narrow, tmp_path / "out")
    again, _ = load_pretrained(tmp_path / "out", scan_layers=scan)
    assert_same(split_model(again)[1], split_model(narrow.model)[1])
    assert weights_of(slam_jax.load(tmp_path / "out").model) == kind
    dtypes = {x.dtype.name for x in load_file(tmp_path / "out/model.safetensors").values()}
    assert dtypes == {"float32", kind}


@slow
def test_the_command_prints_what_the_weights_change(tmp_path, capfd):
    write_language_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("It rains in Spain, and the plain is wet. " * 8)
    command = [sys.executable, "-m", "slam_jax.evaluation.weights", f"--model={tmp_path}/model"]
    done = subprocess.run([*command, f"--text={tmp_path}/text.txt", "--window=16"], timeout=300)
    rows = [line.split() for line in capfd.readouterr().out.splitlines()[1:]]
    assert not done.returncode and [row[0] for row in rows] == ["float32", "bfloat16", "int8"]
    errors = np.array([row[1:3] for row in rows], float)
    assert not errors[0].any() and (errors[1:] > 0).all() and (errors[1:] < 0.2).all()
    changes = [float(row[4].rstrip("%")) for row in rows]
    assert changes[0] == 0 and all(abs(change) < 1 for change in changes)
    assert subprocess.run(command, timeout=300).returncode == 2
    assert "needs --text=FILE" in capfd.readouterr().err
