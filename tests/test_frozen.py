"""What trains and what does not: patterns, the step, base weights, runs and their checkpoints."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same

from slam_jax.errors import ConfigError
from slam_jax.planning.subjects import LanguageRun
from slam_jax.slam_v3 import SlamV3, SlamV3Config
from slam_jax.training import (
    Experiment,
    OptimizerConfig,
    default_config,
    make_optimizer,
    make_train_step,
    override,
    split_model,
)
from slam_jax.training.checkpoint.trees import by_name, num_bytes
from slam_jax.training.experiment import as_json
from slam_jax.training.losses import LossParts
from slam_jax.training.start import compile_step, jit_train_step
from slam_jax.training.state import init_state
from slam_jax.training.trainable import merge, names_in, partition, split_of

ROOT = Path(__file__).parent.parent


def shapes_of(**changes: Any) -> Any:
    config = SlamV3Config.preset("tiny", 13, **changes)
    return split_model(nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0))))[1]


@pytest.fixture(scope="module")
def shapes():
    return shapes_of()


# --- Patterns


def frozen(shapes, train=(), freeze=(), provided=()):
    given = {name: by_name(shapes)[name] for name in provided}
    return split_of(shapes, OptimizerConfig(train=train, freeze=freeze), given).frozen


def test_patterns_choose_what_trains(shapes):
    names = names_in(shapes)
    below = lambda start: {name for name in names if name.startswith(f"{start}/")}  # noqa: E731
    image, layer = below("streams/image"), below("decoder/layers/0")
    assert image and layer and frozen(shapes) == set()
    assert frozen(shapes, freeze=("streams/image",)) == image
    assert frozen(shapes, freeze=("streams/image/*", "decoder/layers/0")) == image | layer
    assert frozen(shapes, train=("decoder/layers/0",)) == names - layer
    kernels = {name for name in layer if name.endswith("/kernel")}
    assert frozen(shapes, ("decoder/layers/0",), ("*/kernel",)) == names - layer | kernels
    assert frozen(shapes, train=("head/kernel",)) == names - {"head/kernel"}
    # Base weights are frozen unless `train` names them.
    assert frozen(shapes, provided=kernels) == kernels
    assert frozen(shapes, freeze=("head",), provided=kernels) == kernels | {"head/kernel"}
    assert frozen(shapes, train=("*",), provided=kernels) == set()


@pytest.mark.parametrize(
    ("train", "freeze", "message"),
    [
        ((), ("image/*",), "optimizer.freeze has the pattern 'image/*', .* mean 'streams/image'?"),
        (("decodr",), (), "optimizer.train has the pattern 'decodr', .* did you mean 'decoder'"),
        (("head", "zzz"), (), "'zzz', which matches no parameter; paths begin with alignment, "),
        (("head",), ("head/*",), "leave no parameter that trains"),
        ((), ("*",), "leave no parameter that trains"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(shapes, train, freeze, message):
    with pytest.raises(ConfigError, match=re.escape(message).replace(r"\.\*", ".*")) as error:
        frozen(shapes, train, freeze)
    assert "\n" not in str(error.value)


def test_stacked_layers_are_frozen_together():
    stacked = shapes_of(scan_layers=True, num_decoder_layers=3)
    assert frozen(stacked, freeze=("decoder/layers/*/mlp",)) == {
        f"decoder/layers/{i}/mlp/{name}/kernel" for i in range(3) for name in ("down", "gate", "up")
    }
    one = by_name(stacked)["decoder/layers/1/mlp/up/kernel"]
    message = "decoder/layers/1/.* is frozen and decoder/layers/0/.* set model.scan_layers=False"
    with pytest.raises(ConfigError, match=message):
        frozen(stacked, freeze=("decoder/layers/1",))
    with pytest.raises(ConfigError, match=message):
        frozen(stacked, provided=("decoder/layers/1/mlp/up/kernel",))
    assert one.ndim == 2


def test_patterns_are_tuples_of_text():
    config = as_json(default_config("tiny"))
    chosen = override(config, ["--config.optimizer.freeze=('image/*',)"])
    assert Experiment.from_config(chosen).optimizer.freeze == ("image/*",)
    for text in ("image/*", "(1,)"):
        with pytest.raises(ConfigError, match="optimizer.freeze is .* expected a list"):
            Experiment.from_config(override(config, [f"--config.optimizer.freeze={text}"]))


def test_trees_are_split_and_merged(shapes):
    rest, chosen = partition(shapes, frozen(shapes, freeze=("decoder/layers/0/mlp", "head")))
    assert names_in(rest) | names_in(chosen) == names_in(shapes)
    assert not names_in(rest) & names_in(chosen) and "head/kernel" in names_in(chosen)
    assert_same(merge(rest, chosen), shapes)
    assert merge(shapes, None) is shapes and merge({}, shapes) is shapes


# --- The step


class Toy(nnx.Module):
    """Two maps of other shapes; beside the frozen kernel of one there is a bias that trains."""

    def __init__(self, *, rngs=None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.up = nnx.Linear(5, 7, rngs=rngs)
        self.out = nnx.Linear(7, 3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)


def toy_loss(model, batch, *, key):
    total, zero = jnp.mean(model.head(model.out(jnp.tanh(model.up(batch)))) ** 2), jnp.zeros(())
    return LossParts(total, total, zero, zero, zero)


KERNELS = ("up/kernel", "out/kernel")
BATCH = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)


def toy_state(config: OptimizerConfig, dtype: Any = jnp.bfloat16) -> Any:
    graphdef, params = split_model(Toy())
    params, frozen = split_of(params, config).of(params)
    frozen = jax.tree.map(lambda x: x.astype(dtype), frozen)
    optimizer = make_optimizer(config, 10)
    ema = config.ema_decay is not None
    state = init_state(params, optimizer, jax.random.key(0), ema=ema, frozen=frozen)
    return graphdef, jax.device_put(state, jax.devices()[0])


@pytest.mark.parametrize("parts", [1, 2])
def test_no_gradient_of_a_frozen_parameter_is_computed(parts):
    config = OptimizerConfig(freeze=KERNELS, accumulate_steps=parts)
    graphdef, state = toy_state(config, jnp.float32)
    step = jit_train_step(graphdef, state, toy_loss, config, 10, lambda part: 1.0)
    gradients: Any = compile_step(step, state, BATCH)[0]
    # The gradients and the five parts of the loss.
    assert gradients.memory_analysis().output_size_in_bytes < 4 * (7 + 3 + 3 * 2 + 2 + 5) + 128
    text = gradients.as_text()
    moved = "parameter|copy|transpose|bitcast|get-tuple-element"
    made = set(re.findall(rf"= \w+\[([\d,]*)\]\S* (?!{moved})", text))
    assert "4,7" in made or "2,7" in made
    assert not made & {"5,7", "7,3"}, made
    # The others have the gradients that they have when everything trains.
    all_train = dataclasses.replace(state, params=merge(state.params, state.frozen), frozen=None)
    optimizer = make_optimizer(config, 10)
    step_of_all = make_train_step(graphdef, toy_loss, optimizer, accumulate_steps=parts)
    whole, _ = jax.jit(step_of_all.gradients)(all_train, BATCH)
    found, _ = step.gradients(state, BATCH)
    assert names_in(found) == names_in(whole) - {*KERNELS}
    for name, x in by_name(found).items():
        np.testing.assert_allclose(x, by_name(whole)[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_parameters_stay_as_they_are(name):
    config = OptimizerConfig(
        name=name, freeze=KERNELS, learning_rate=0.1, weight_decay=0.5, ema_decay=0.9
    )
    graphdef, state = toy_state(config)
    first = jax.tree.map(np.asarray, (state.params, state.frozen))
    step = jit_train_step(graphdef, state, toy_loss, config, 10, lambda part: 1.0)
    losses = []
    for _ in range(4):
        state, metrics = step(state, BATCH)
        losses.append(float(metrics.loss.total))
    assert losses[-1] < losses[0]
    assert_same(jax.tree.map(np.asarray, state.frozen), first[1])
    assert {x.dtype for x in jax.tree.leaves(state.frozen)} == {jnp.dtype(jnp.bfloat16)}
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), state.params, first[0])
    assert all(jax.tree.leaves(changed))
    # Neither moments nor average.
    kept = {x.shape for x in jax.tree.leaves((state.opt_state, state.ema))}
    assert (3, 2) in kept and not kept & {(5, 7), (7, 3)}
    assert names_in(state.ema) == names_in(state.params)
    assert names_in(state.best_params) == {*names_in(state.params), *KERNELS}
    np.testing.assert_array_equal(state.best_params["up"]["bias"], state.ema["up"]["bias"])


def test_a_plan_counts_no_moments_of_frozen_parameters():
    def bytes_of(**patterns):
        run = LanguageRun("standard", "tiny", 2, 8, optimizer=OptimizerConfig(**patterns))
        state = run.subject().state[1]
        return [num_bytes(x) for x in (state.params, state.frozen, state.opt_state)]

    whole, part = bytes_of(), bytes_of(freeze=("blocks",))
    assert whole[1] == 0 < part[1] and part[0] + part[1] == whole[0]
    assert part[2] - 2 * part[0] == whole[2] - 2 * whole[0]  # but for counters
