"""Products of float32 matrices have the configured precision on accelerators."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.lax import Precision

from slam_jax.errors import ConfigError
from slam_jax.kernels.backend import for_accelerators
from slam_jax.language_models import make_config, make_model
from slam_jax.slam_v3 import SlamV3, SlamV3Config
from slam_jax.training import loop, read_config, train

pytestmark = pytest.mark.release

CONFIG = SlamV3Config.preset("tiny", 13, dtype="float32", matmul_precision="float32")
TOKENS = np.zeros((2, 3, 7), np.int32)


def precisions(function, *arguments) -> set[Any]:
    """The precisions of all products and convolutions in the function and in its gradient."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                both = equation.params["precision"] or (None, None)
                yield from both
            for inner in jaxprs_in_params(equation.params):
                yield from walk(inner)

    gradient = jax.grad(lambda *given: jnp.sum(function(*given)))
    with jax.default_matmul_precision(None):  # all tests have another
        return set(walk(jax.make_jaxpr(gradient)(*arguments).jaxpr))


@pytest.mark.parametrize(
    ("fields", "device", "expected"),
    [
        (dict(matmul_precision="float32"), for_accelerators, {Precision.HIGHEST}),
        (dict(matmul_precision="tensorfloat32"), for_accelerators, {Precision.HIGH}),
        (dict(matmul_precision=None), for_accelerators, {None}),
        (dict(matmul_precision="float32"), contextlib.nullcontext, {None}),
        (dict(matmul_precision="float32", dtype="bfloat16"), for_accelerators, {None}),
    ],
    ids=["float32", "tensorfloat32", "unset", "on a CPU", "bfloat16"],
)
def test_slam_v3_multiplies_in_the_precision_of_its_config(make_inputs, fields, device, expected):
    with device():
        config = dataclasses.replace(CONFIG, **fields)
        model = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
        inputs = make_inputs(size=24)
        assert precisions(lambda model: model(TOKENS, inputs).logits, model) == expected


def test_every_method_of_slam_v3_multiplies_in_the_precision_of_its_config(make_inputs):
    def calls(model):
        y, streams, _ = model.run_processes(inputs)
        memory, cache = model.fuse(y, streams), model.init_cache((2, 3), 8)
        logits, cache = model.prefill(TOKENS, cache, memory)
        step, _ = model.decode_step(TOKENS[..., 0], cache, memory)
        heads = model.decode(TOKENS, memory), logits, step, model.embed(inputs)
        return sum(jnp.sum(x) for x in heads)

    inputs = make_inputs(size=24)
    with for_accelerators():
        model = nnx.eval_shape(lambda: SlamV3(CONFIG, rngs=nnx.Rngs(0)))
        assert precisions(calls, model) == {Precision.HIGHEST}


@pytest.mark.parametrize("name", ["standard", "deepseek_v2"])
def test_language_models_multiply_in_real_float32(name):
    def calls(model):
        logits, cache = model.prefill(TOKENS[:, 0], model.init_cache((2,), 8))
        step, _ = model.decode_step(TOKENS[:, 0, 0], cache)
        return jnp.sum(model(TOKENS[:, 0]).logits) + jnp.sum(logits) + jnp.sum(step)

    config = make_config(name, "tiny")
    with for_accelerators():
        model = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))
        assert precisions(calls, model) == {Precision.HIGHEST}


def test_a_run_multiplies_in_the_precision_of_its_model(tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def compiling(*arguments):
        settings: Any = jax.config
        raise Reached(settings.jax_default_matmul_precision)

    monkeypatch.setattr(loop, "compile_step", compiling)
    config = read_config("tests/configs/small_run.py")
    config["model"].update(dtype="float32", matmul_precision="float32")
    with for_accelerators(), pytest.raises(Reached, match="float32"):
        train(config, tmp_path)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="matmul_precision is 'exact'; expected one of"):
        dataclasses.replace(CONFIG, matmul_precision="exact")
