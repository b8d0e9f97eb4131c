"""Stacked layers compute, train and are stored as single layers."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_same

from slam_jax.kernels.backend import for_accelerators
from slam_jax.language_models.registry import make_config, make_model
from slam_jax.layers.stacked import StackedLayers, names_of
from slam_jax.slam_v3 import ImageConfig, SlamV3, SlamV3Config
from slam_jax.training import (
    Checkpoints,
    Experiment,
    default_config,
    language_model_loss,
    merge_model,
    split_model,
)
from slam_jax.training.checkpoint.trees import by_name, from_names
from slam_jax.training.optimizer import OptimizerConfig, make_optimizer
from slam_jax.training.slam_v3_task import SlamV3Task
from slam_jax.training.start import initial_state, state_shapes

pytestmark = pytest.mark.release

VOCAB = 13
TOKENS = np.arange(2 * 3 * 5).reshape(2, 3, 5) % VOCAB
FIXTURES = Path(__file__).parent / "fixtures" / "v0_11_0"
slow = pytest.mark.slow


def assert_close(actual: Any, expected: Any) -> None:
    """Arrays agree to the rounding of float32, measured by the largest number of the tree."""
    most = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    check = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6 * most)
    jax.tree.map(check, actual, expected)


def both(make: Any) -> list[tuple[nnx.GraphDef, Any]]:
    """The model without and with stacked layers, of the same parameters."""
    graphdef, like = split_model(nnx.eval_shape(lambda: make(True)))
    assert any(":" in str(key) for path, _ in jax.tree.leaves_with_path(like) for key in path)
    single = split_model(make(False))
    return [single, (graphdef, from_names(by_name(single[1]), like))]


@pytest.mark.parametrize("remat", [pytest.param(None, marks=slow), "layers"])
def test_slam_v3_computes_the_same(make_inputs, remat):
    vit = ImageConfig("vit", size=6, patch_size=3, num_layers=2)
    depths: Any = dict(num_process_layers=2, num_decoder_layers=2, dropout=0.1, qk_norm=True)

    def make(scan: bool) -> SlamV3:
        changes: Any = dict(image=vit, remat=remat, scan_layers=scan, **depths)
        return SlamV3(SlamV3Config.preset("tiny", VOCAB, **changes), rngs=nnx.Rngs(0))

    inputs = make_inputs(2, size=6)

    def run(graphdef: Any, params: Any) -> Any:
        def loss(params: Any) -> Any:
            model = merge_model(graphdef, params)
            output = model(TOKENS, inputs, key=jax.random.key(1), attention=True)
            return (output.logits**2).mean(), output.attention

        (total, attention), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        model = merge_model(graphdef, params)
        memory, cache = model.encode(inputs), model.init_cache((2, 3), 6)
        logits, cache = model.prefill(TOKENS, cache, memory)
        step = model.decode_step(TOKENS[..., 0], cache, memory)
        return total, attention, gradients, logits, step

    single, stacked = (jax.jit(functools.partial(run, *each[:1]))(each[1]) for each in both(make))
    assert single[1].processes.shape[2] == 2  # layers
    for name, expected in by_name(single[2]).items():
        assert expected.any() or name.startswith("alignment"), name
    assert_close(by_name(stacked[2]), by_name(single[2]))
    assert_close((*stacked[:2], *stacked[3:]), (*single[:2], *single[3:]))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("deepseek_v2", dict(num_layers=4), marks=slow),  # one block, then three
        ("jamba", dict(num_layers=5, attention_period=1, attention_offset=0)),  # 2 periods and one
        pytest.param("jamba", dict(num_layers=8), marks=slow),
        pytest.param("hunyuan_large", dict(num_layers=5), marks=slow),
        pytest.param("slam_v4", dict(level_layers=2), marks=slow),
        pytest.param("slam_v4_champion", dict(level_layers=2), marks=slow),
        pytest.param("slam_v5", dict(level_layers=2), marks=slow),
        pytest.param("slam_v6", dict(level_layers=2, dropout=0.1), marks=slow),
        pytest.param("standard", dict(num_layers=3, remat="maps"), marks=slow),
        pytest.param("moe", dict(num_layers=3), marks=slow),
        pytest.param("hunyuan_v1_moe", dict(num_layers=3), marks=slow),
        pytest.param("slam_v3_text", dict(num_decoder_layers=2, dropout=0.1), marks=slow),
    ],
)
def test_language_models_compute_the_same(name, changes):
    tokens = TOKENS[:, 0]

    def make(scan: bool) -> Any:
        config = make_config(name, "tiny", vocab_size=VOCAB, scan_layers=scan, **changes)
        return make_model(config, rngs=nnx.Rngs(0))

    def run(graphdef: Any, params: Any) -> Any:
        def loss(params: Any) -> Any:
            model = merge_model(graphdef, params)
            return language_model_loss(model, tokens, key=jax.random.key(1)).total

        total, gradients = jax.value_and_grad(loss)(params)
        model = merge_model(graphdef, params)
        logits, cache = model.prefill(tokens, model.init_cache((2,), 6))
        return total, gradients, logits, model.decode_step(tokens[:, 0], cache)

    single, stacked = (jax.jit(functools.partial(run, *each[:1]))(each[1]) for each in both(make))
    assert_close(by_name(stacked[1]), by_name(single[1]))
    assert_close((stacked[0], *stacked[2:]), (single[0], *single[2:]))


def test_layers_are_stacked_by_default_on_accelerators_alone_and_from_five_on():
    def layers(**changes: Any) -> Any:
        config = SlamV3Config.preset("tiny", VOCAB, **changes)
        return nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0))).decoder.layers

    on_cpu = jax.default_backend() == "cpu"
    assert isinstance(layers(num_decoder_layers=5), nnx.List if on_cpu else StackedLayers)
    with for_accelerators():
        assert isinstance(layers(num_decoder_layers=5), StackedLayers)
        assert isinstance(layers(num_decoder_layers=4), nnx.List)
        assert isinstance(layers(num_decoder_layers=5, scan_layers=False), nnx.List)


def test_names_are_those_of_single_layers():
    assert names_of("blocks/1:4/norm/scale") == ([f"blocks/{i}/norm/scale" for i in (1, 2, 3)], 0)
    assert names_of("blocks/1:7:3/mixer") == (["blocks/1/mixer", "blocks/4/mixer"], 0)
    name = "mu/processes/stack/layers/{}/mlp"
    assert names_of(name.format("0:2")) == ([name.format(0), name.format(1)], 1)
    assert names_of("head/kernel") == (["head/kernel"], None)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_updates_each_stacked_layer_by_itself(name):
    """Also where one gradient is a thousand times another, and where one is zero."""
    kernels = jax.random.normal(jax.random.key(0), (2, 3, 8, 6))  # processes, layers
    grads = kernels[::-1] * jnp.array([1.0, 1e3, 0.0])[None, :, None, None]

    def tree(x: Any, stacked: bool) -> Any:
        layers = {"0:3": x} if stacked else {i: x[:, i] for i in range(3)}
        layers = {name: {"mlp": {"up": {"kernel": each}}} for name, each in layers.items()}
        return {"processes": {"stack": {"layers": layers}}}

    optimizer = make_optimizer(OptimizerConfig(name=name, warmup_steps=0, clip_norm=None), 10)

    @functools.partial(jax.jit, static_argnums=0)
    def updated(stacked: bool) -> Any:
        params = tree(kernels, stacked)
        state = optimizer.init(params)
        _, state = optimizer.update(tree(kernels, stacked), state, params)  # gives all a momentum
        return optimizer.update(tree(grads, stacked), state, params)

    single, stacked = updated(False), updated(True)
    assert not by_name(stacked[0])["processes/stack/layers/2/mlp/up/kernel"].any()
    for part in zip(by_name(stacked).items(), by_name(single).items(), strict=True):
        (_, x), (_, y) = part
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7 * max(1, np.abs(y).max()))


def experiment(scan: bool) -> Experiment:
    config: Any = default_config("tiny")
    config.model.image = dict(encoder="vit", size=6, patch_size=3, num_layers=2)
    config.model.num_process_layers = 2
    config.model.dropout, config.model.scan_layers = 0.1, scan
    config.optimizer.name, config.optimizer.ema_decay = "muon", 0.9
    return Experiment.from_config(config)


@functools.cache
def state_of(scan: bool) -> Any:
    return initial_state(SlamV3Task(experiment(scan)), VOCAB)[1]


@functools.cache
def shapes_of(scan: bool) -> Any:
    return state_shapes(SlamV3Task(experiment(scan)), VOCAB)[1]


def test_a_run_starts_alike_with_and_without_stacks():
    assert_close(by_name(state_of(True).params), by_name(state_of(False).params))


@pytest.mark.parametrize("saved", [False, True])
def test_a_checkpoint_is_restored_with_and_without_stacks(tmp_path, saved):
    """The whole state: parameters, their average, the optimizer's state and the keys."""
    state, checkpoints = state_of(saved), Checkpoints(tmp_path)
    checkpoints.save(1, state, config={}, tokenizer="", metrics={})
    checkpoints.wait()
    for scan in (False, True):
        like = shapes_of(scan)
        restored = checkpoints.restore(1, like)
        assert jax.tree.structure(restored) == jax.tree.structure(like)
        assert [x.shape for x in jax.tree.leaves(restored)] == [
            x.shape for x in jax.tree.leaves(like)
        ]
        found, expected = by_name(restored), by_name(state)
        assert_same(found, {name: expected[name] for name in found})
        assert found.keys() == expected.keys()


def test_a_checkpoint_of_0_11_is_restored_into_stacks():
    checkpoints = Checkpoints(FIXTURES / "run")
    config = checkpoints.read_config("latest")
    config["model"]["scan_layers"] = True
    model = Experiment.from_config(config).with_vocabulary(
        checkpoints.read_shapes("latest")["params"]["head"]["kernel"].shape[1]
    )
    like = split_model(nnx.eval_shape(lambda: SlamV3(model, rngs=nnx.Rngs(0))))[1]
    assert "0:2" in like["decoder"]["layers"]
    restored = checkpoints.restore_subtree("latest", "ema", like)
    saved = checkpoints.restore("latest", checkpoints.read_shapes("latest"))["ema"]
    assert_same(by_name(restored), {name: by_name(saved)[name] for name in by_name(restored)})
