"""What test_sharding.py runs in a process of its own, with eight virtual devices."""

import functools
import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import write_language_model
from flax import nnx
from helpers import assert_same, write_texts
from jax.sharding import NamedSharding, PartitionSpec

from slam_jax.data import Batch
from slam_jax.errors import ConfigError
from slam_jax.kernels import fused_attention
from slam_jax.kernels.backend import for_accelerators
from slam_jax.language_models.registry import SYSTEMS, make_config, make_model
from slam_jax.layers import Causal
from slam_jax.layers.constrain import taken
from slam_jax.planning.collectives import collectives
from slam_jax.planning.compiled import compiled_step, extrapolated
from slam_jax.planning.machine import Machine
from slam_jax.planning.meshes import factors, search
from slam_jax.planning.plans import plan_step
from slam_jax.planning.subjects import LanguageRun, slam_v3_run
from slam_jax.slam_v3 import Inputs, SlamV3, SlamV3Config
from slam_jax.training import (
    Checkpoints,
    Experiment,
    LossConfig,
    default_config,
    default_language_config,
    language_model_loss,
    load,
    loop,
    merge_model,
    override,
    read_config,
    slam_v3_loss,
    slam_v3_task,
    split_model,
    train,
)
from slam_jax.training.checkpoint.trees import by_name
from slam_jax.training.experiment import as_json
from slam_jax.training.mesh import MeshConfig, make_mesh
from slam_jax.training.metrics import read_metrics
from slam_jax.training.sharding import place, shardings_of, use_mesh
from slam_jax.training.slam_v3_task import SlamV3Task
from slam_jax.training.start import compile_step, initial_state, jit_step

VOCAB = 16
slow = pytest.mark.slow
SIZES = {"data": 4, "fsdp": 4, "process": 4, "tensor": 2}


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def mesh_of(**sizes: Any) -> Any:
    config = MeshConfig(**{"data": 1, "process": 1, **sizes})
    return make_mesh(config, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def compiled_first_step(loss: Any, params: Any, batch: Any, mesh: Any) -> tuple[Any, Any]:
    """The loss and its gradients as a compiled executable under this mesh, and its arguments."""
    shardings = shardings_of(params, mesh)
    given = jax.device_put(params, shardings), place(batch, mesh, 8)
    with use_mesh(mesh):
        run = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
        return run.lower(*given).compile(), given


def first_step(loss: Any, params: Any, batch: Any, mesh: Any) -> tuple[Any, Any]:
    """The loss and its gradients, as a step under this mesh has them."""
    run, given = compiled_first_step(loss, params, batch, mesh)
    return run(*given)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Each array within so much of the largest number in it, or of the 1e-6 part of all."""
    most = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    actual, expected = by_name(actual), by_name(expected)
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        scale = max(np.abs(x).max(), 1e-6 * most)
        difference = np.abs(np.asarray(actual[name]) - np.asarray(x)).max()
        assert difference <= tolerance * scale, (name, difference / scale)


# --- SLAM v3


@functools.cache
def v3(**changes: Any) -> tuple[Any, Any, Any]:
    """The loss, the parameters and a batch of eight, every stream in it."""
    small = dict(size=12, stage_widths=(8,))
    wide: Any = dict(dtype="float64", param_dtype="float64", image=small, num_decoder_layers=1)
    config = SlamV3Config.preset("tiny", VOCAB, **{**wide, **changes})
    model = jax.jit(lambda: SlamV3(config, rngs=nnx.Rngs(0)))()
    graphdef, params = split_model(model)

    def loss(params: Any, batch: Batch) -> jax.Array:
        return slam_v3_loss(merge_model(graphdef, params), batch, LossConfig()).total

    return loss, params, make_batch(np.float64)


def make_batch(dtype: Any) -> Batch:
    rng, size = np.random.default_rng(0), 8
    prompt = rng.integers(2, 4, (size, 2), np.int32)
    inputs = Inputs(
        text=rng.integers(0, VOCAB, (size, 6), np.int32),
        text_mask=np.arange(6) < rng.integers(1, 7, (size, 1)),
        image=rng.integers(0, 256, (size, 12, 12, 3), np.uint8),
        aux=rng.normal(size=(size, 3, 5)).astype(dtype),
    )
    return Batch(inputs, rng.integers(3, VOCAB, (size, 2, 7), np.int32), prompt, prompt + 2)


@functools.cache
def v3_alone() -> tuple[Any, Any]:
    return first_step(*v3(), None)


@pytest.mark.usefixtures("float64")
def test_three_axes_at_once_change_no_loss_and_no_gradient():
    """The fourth axis, `data`, is in the twenty training steps below."""
    assert_close(first_step(*v3(), mesh_of(fsdp=2, process=2, tensor=2)), v3_alone())


@pytest.mark.usefixtures("float64")
def test_the_default_mesh_computes_nothing_twice():
    """data 2 x process 4, with the loss and gradients of one device; a device has at most as many
    operations as when the batch alone is divided."""
    mesh: Any = make_mesh(MeshConfig(), 4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "process": 4, "tensor": 1}
    run, given = compiled_first_step(*v3(), mesh)
    assert_close(run(*given), v3_alone())
    rows_alone, _ = compiled_first_step(*v3(), mesh_of(data=8))
    assert run.cost_analysis()["flops"] < 1.15 * rows_alone.cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_stacked_layers_are_sharded_as_single_ones():
    scanned = v3(num_process_layers=2, num_decoder_layers=2, scan_layers=True)
    mesh = mesh_of(fsdp=2, process=2, tensor=2)
    params = jax.device_put(scanned[1], shardings_of(scanned[1], mesh))
    down = params["processes"]["stack"]["layers"]["0:2"]["mlp"]["down"]["kernel"]
    assert held(down) == (2, 2, 24, 16)  # processes, layers, F, D
    assert_close(first_step(*scanned, mesh), first_step(*scanned, None))


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "sizes", [{axis: size} for axis, size in SIZES.items()] + [{"process": 2}], ids=str
)
def test_an_axis_alone_changes_no_loss_and_no_gradient(sizes):
    assert_close(first_step(*v3(), mesh_of(**sizes)), v3_alone())


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("pair", list(itertools.combinations(SIZES, 2)), ids="-".join)
def test_two_axes_change_no_loss_and_no_gradient(pair):
    sizes = {axis: min(SIZES[axis], 2) for axis in pair}
    assert_close(first_step(*v3(), mesh_of(**sizes)), v3_alone())


# --- Language models


@functools.cache
def language_model(name: str) -> tuple[Any, Any, Any]:
    config = make_config(name, "tiny", vocab_size=VOCAB, dtype="float64", param_dtype="float64")
    graphdef, params = split_model(jax.jit(lambda: make_model(config, rngs=nnx.Rngs(0)))())

    def loss(params: Any, tokens: Any) -> jax.Array:
        return language_model_loss(merge_model(graphdef, params), tokens).total

    return loss, params, np.random.default_rng(0).integers(0, VOCAB, (8, 17), np.int32)


@functools.cache
def language_model_alone(name: str) -> tuple[Any, Any]:
    return first_step(*language_model(name), None)


@functools.cache
def language_model_on(name: str, axis: str) -> tuple[Any, Any]:
    return compiled_first_step(*language_model(name), mesh_of(**{axis: SIZES[axis]}))


def cases() -> Any:
    for name in SYSTEMS:
        # `process` divides what is stacked.
        stacked = name in ("slam_v4", "slam_v4_champion", "slam_v5", "slam_v3_text")
        for axis in SIZES if stacked else ("data", "fsdp", "tensor"):
            quick = (name, axis) == ("moe", "tensor")
            yield pytest.param(name, axis, marks=() if quick else pytest.mark.slow)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "axis"), list(cases()))
def test_an_axis_changes_nothing_of_a_language_model(name, axis):
    run, given = language_model_on(name, axis)
    assert_close(run(*given), language_model_alone(name))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("name", "sizes", "expected_parts"),
    [
        ("standard", {"data": 2, "tensor": 2}, {(4, 16, 2, 8)}),
        ("standard", {"tensor": 4}, {(8, 16, 4, 8)}),  # two heads of keys are for all
        pytest.param("deepseek_v2", {"data": 2, "tensor": 2}, {(4, 16, 2, 12)}, marks=slow),
        pytest.param("deepseek_v2", {"tensor": 4}, {(8, 16, 1, 12)}, marks=slow),
        pytest.param("slam_v4", {"data": 2, "tensor": 2}, {(4, 16, 2, 8)}, marks=slow),
        # All rows in the parallel blocks, two of eight before and after them.
        pytest.param("slam_v4", {"process": 4}, {(2, 16, 4, 8), (8, 16, 4, 8)}, marks=slow),
    ],
    ids=str,
)
def test_a_kernel_runs_on_each_device_for_its_part(monkeypatch, name, sizes, expected_parts):
    alone = jax.nn.dot_product_attention
    expected, parts = language_model_alone(name), set()

    def attention(q, *given, **named):
        parts.add(q.shape)
        return alone(q, *given, **named)

    monkeypatch.setattr(fused_attention, "_LEAST_PAIRS", 0)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    with for_accelerators("xla"):
        sharded = first_step(*language_model(name), mesh_of(**sizes))
    # Its softmax is in float32.
    assert_close(sharded, expected, 1e-4)
    assert parts == expected_parts


def test_a_mask_is_divided_like_the_rows():
    """By rows, over the devices that also divide processes and heads."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 4, 6, 4, 8), (4, 5, 2, 8), (4, 5, 2, 8))
    given = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    mask = jnp.asarray(np.arange(5) < np.array([5, 3, 0, 1])[:, None, None])

    def loss(q, k, v):
        def run(q):
            return fused_attention.fused_attend(q, k, v, mask, "xla")

        with taken("process"):
            return jnp.sum(jnp.sin(jax.vmap(run, spmd_axis_name="process")(q)))

    gradient = jax.value_and_grad(loss, (0, 1, 2))
    with use_mesh(mesh_of(data=2, process=2, tensor=2)):
        sharded = jax.jit(gradient)(*given)
    for one, other in zip(*map(jax.tree.leaves, (sharded, gradient(*given))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_kernel_takes_what_a_callers_shard_map_has_divided():
    q, rows = jax.random.normal(jax.random.key(0), (32, 6, 4, 8)), PartitionSpec("data")

    def attend(q):
        return fused_attention.fused_attend(q, q, q, Causal(), "xla")

    mesh = mesh_of(data=4)
    divided = jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows)
    with use_mesh(mesh):
        np.testing.assert_allclose(jax.jit(divided)(q), attend(q), atol=1e-6)


# --- Where arrays are placed

# Axis -> parameter -> what one device holds of it.
HELD = {
    "data": {"head/kernel": (32, 16), "processes/stack/instruction": (4, 32)},
    "fsdp": {
        "embedding/embedding": (16, 8),
        "head/kernel": (8, 16),
        "streams/image/stem/kernel": (5, 5, 3, 2),
        "level_one/block/attention/query/kernel": (8, 2, 16),
        "level_one/norm/scale": (32,),
        "processes/stack/layers/0/mlp/down/kernel": (4, 48, 8),
        "fusion/concat/kernel": (128, 8),
        "decoder/layers/0/attention/kv_down/kernel": (8, 12),
        "decoder/layers/0/attention/out/kernel": (2, 16, 8),
    },
    "process": {
        "processes/stack/instruction": (1, 32),
        "processes/stack/norm/scale": (1, 32),
        "processes/stack/layers/0/isolated/out/kernel": (1, 2, 16, 32),
        "fusion/concat/kernel": (32, 32),
        "level_one/key/kernel": (32, 2, 16),
    },
    "tensor": {
        "embedding/embedding": (8, 32),
        "head/kernel": (32, 8),
        "processes/stack/layers/0/query_bias": (4, 1, 16),
        "processes/stack/layers/0/mlp/up/kernel": (4, 32, 24),
        "decoder/layers/0/attention/q_nope/kernel": (20, 1, 16),
        "decoder/layers/0/attention/out/kernel": (1, 16, 32),
        "decoder/layers/0/mlp/down/kernel": (24, 32),
    },
}


def held(array: jax.Array) -> tuple[int, ...]:
    [shape] = {shard.data.shape for shard in array.addressable_shards}
    return shape


def experiment_of(sizes: dict[str, int], **changes: Any) -> Experiment:
    config: Any = default_config("tiny")
    config.model.image.size, config.model.image.stage_widths = 12, (8,)
    config.model.num_decoder_layers = 1
    config.model.dropout, config.model.dtype = 0.1, "float32"
    config.data.batch_size = 8
    config.optimizer.ema_decay = 0.9
    config.optimizer.warmup_steps = 2
    config.optimizer.learning_rate = 1e-2
    arguments = {**{f"mesh.{axis}": size for axis, size in sizes.items()}, **changes}
    arguments = [f"--config.{name}={value}" for name, value in arguments.items()]
    return Experiment.from_config(override(as_json(config), arguments))


@functools.cache
def start_alone(**changes: Any) -> tuple[Any, Any]:
    return initial_state(SlamV3Task(experiment_of({}, **changes)), VOCAB)


def first_state() -> Any:
    return start_alone()[1]


@pytest.mark.parametrize("axis", list(HELD))
def test_each_device_holds_its_part(axis):
    mesh = mesh_of(**{axis: SIZES[axis]})
    state = jax.device_put(first_state(), shardings_of(first_state(), mesh))
    moments = state.opt_state[1][0]
    for part in (state.params, state.ema, moments.mu, moments.nu):
        arrays = by_name(part)
        assert {name: held(arrays[name]) for name in HELD[axis]} == HELD[axis]
    assert held(state.step) == held(state.key) == ()


@functools.cache
def on_four_processes() -> tuple[Any, Any]:
    """The first state of a run whose processes are on four devices, and its jitted step."""
    mesh, experiment = mesh_of(process=4), experiment_of({})
    with use_mesh(mesh):
        graphdef, state = initial_state(SlamV3Task(experiment), VOCAB, mesh)
        return state, jit_step(SlamV3Task(experiment), graphdef, state)


def test_a_state_starts_as_on_one_device_and_is_restored_onto_others(tmp_path):
    alone, (state, _) = first_state(), on_four_processes()
    assert held(state.params["processes"]["stack"]["instruction"]) == (1, 32)
    assert_same(jax.device_get(state), jax.device_get(alone))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, config={}, tokenizer="", metrics={})
    checkpoints.wait()
    for like in (jax.device_put(alone, shardings_of(alone, mesh_of(fsdp=4))), alone):
        restored = checkpoints.restore(1, like)
        assert_same(jax.device_get(restored), jax.device_get(alone))
        pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True)
        assert all(x.sharding == y.sharding for x, y in pairs)


# --- Training


def steps(
    experiment: Experiment, mesh: Any, count: int, start: tuple[Any, Any] | None = None
) -> tuple[list[float], Any]:
    """The loss of each of the first steps, and the state after them."""
    batch = make_batch(np.float32)
    with use_mesh(mesh):
        if experiment.mesh.process == 4 and experiment.mesh.data == 1:
            state, step_fn = on_four_processes()
        else:
            graphdef, state = start or initial_state(SlamV3Task(experiment), VOCAB, mesh)
            step_fn = jit_step(SlamV3Task(experiment), graphdef, state)
        state = jax.tree.map(jnp.copy, state)  # a step donates it
        losses = []
        for _ in range(count):
            state, metrics = step_fn(state, place(batch, mesh, 8))
            losses.append(float(metrics.loss.total))
    return losses, state


@functools.cache
def steps_alone(**changes: Any) -> list[float]:
    return steps(experiment_of({}, **changes), None, 20, start_alone(**changes))[0]


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param({"process": 4}, {}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "process": 4}, {}, marks=pytest.mark.slow),
        pytest.param(
            {"data": 2, "process": 4}, {"optimizer.accumulate_steps": 2}, marks=pytest.mark.slow
        ),
        pytest.param({"fsdp": 2, "process": 2, "tensor": 2}, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_twenty_steps_end_at_the_same_loss(sizes, changes):
    experiment = experiment_of({"data": 1, **sizes, "zero": True}, **changes)
    mesh = mesh_of(**sizes)
    losses, state = steps(experiment, mesh, 20)
    np.testing.assert_allclose(losses, steps_alone(**changes), rtol=1e-3)
    assert losses[-1] < 0.7 * losses[0]
    shardings = shardings_of(state, mesh, zero=True)
    jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim) or 1 / 0, state, shardings)
    if sizes.get("data") == 2:  # of the moments and the average each half of the devices has half
        name = "head/kernel"
        assert held(by_name(state.params)[name]) == (32, 16)
        assert held(by_name(state.ema)[name]) == (16, 16)
        assert held(by_name(state.opt_state[1][0].mu)[name]) == (16, 16)


# --- What devices send each other


def test_process_weights_never_move():
    """What a step sends. Forward the tokens, and the keys and values of the bank, are gathered, and
    the mean over processes and W_cat are summed; back what was gathered is summed, and what was
    summed gathered: ten times [B, S, D]. The gradients of all other parameters are summed, because
    the devices have different rows there. Beside it a few numbers of each array, for metrics."""
    (state, step), mesh = on_four_processes(), mesh_of(process=4)
    with use_mesh(mesh):
        halves = compile_step(step, state, place(make_batch(np.float32), mesh, 8))
    found = [each for half in halves for each in collectives(str(half.as_text()), mesh.shape)]
    assert {each.axes for each in found} == {("process",)}
    tokens = 8 * (6 + 16 + 3) * 32 * 4
    sent: Any = Counter()
    for each in found:
        sent[each.op] += each.num_bytes
    parameters = jax.tree.leaves(state.params)
    together = [x for x in parameters if x.sharding.is_fully_replicated]
    assert len(parameters) - len(together) == 16
    masks = 8 * 6 + 8 * (6 + 16 + 3)  # of the text, and of the bank
    assert sent.pop("all-gather") == 5 * tokens + masks
    # Kernels that are used for each stream get one sum a stream.
    rest = sent.pop("all-reduce") - 5 * tokens
    assert 1 <= rest / sum(x.nbytes for x in together) < 1.25
    assert not sent


@pytest.mark.usefixtures("float64")
def test_expert_kernels_never_move():
    """Each device runs its experts on the tokens that chose them: what is sent are tokens."""
    compiled, (params, _) = language_model_on("moe", "tensor")
    shape = mesh_of(tensor=2).shape
    found = [each for each in collectives(str(compiled.as_text()), shape) if each.axes]
    assert {(each.op, each.axes) for each in found} == {("all-reduce", ("tensor",))}
    kernels = [x.nbytes for name, x in by_name(params).items() if "/experts/" in name]
    whole_and_halves = {size // n for size in kernels for n in (1, 2)}
    assert kernels and not whole_and_halves & {each.num_bytes for each in found}


@pytest.mark.parametrize("name", ["slam_v5", "standard"])  # latent and grouped-query attention
def test_decoding_steps_of_a_divided_batch_send_nothing(name):
    """Each device has the cache of its rows, and writes each row's token into it."""
    mesh = mesh_of(data=8)
    model = make_model(make_config(name, "tiny"), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    rows, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", None))
    given = jax.device_put((np.zeros(16, np.int32), model.init_cache((16,), 12)), rows)

    def step(params: Any, token: Any, cache: Any) -> Any:
        return nnx.merge(graphdef, params).decode_step(token, cache)

    with use_mesh(mesh):
        compiled = jax.jit(step).lower(jax.device_put(params, whole), *given).compile()
    assert not collectives(str(compiled.as_text()), mesh.shape)


def shaped(batch: Batch) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


@slow
def test_a_plan_is_what_a_run_takes():
    experiment, batch = experiment_of({"zero": True}), make_batch(np.float32)
    mesh = mesh_of(data=2, process=4)
    planned = plan_step(slam_v3_run(experiment, VOCAB, shaped(batch)), mesh)
    state = jax.device_put(first_state(), shardings_of(first_state(), mesh, zero=True))

    def on_one_device(tree: Any) -> int:
        return sum(x.addressable_shards[-1].data.nbytes for x in jax.tree.leaves(tree))

    assert planned.state.params == on_one_device(state.params)
    assert planned.state.opt_state == on_one_device(state.opt_state)
    assert planned.state.ema == on_one_device(state.ema)
    assert (
        planned.state.ema
        < planned.state.params
        < planned.state.opt_state
        < 2 * planned.state.params
    )
    # Half of the examples on each side; masks as in the test above.
    tokens = 4 * (6 + 16 + 3) * 32 * 4
    masks = 4 * 6 + 4 * (6 + 16 + 3)
    assert planned.step.sent[("process",), "all-gather"] == 5 * tokens + masks
    # Beside it some of the gradients, which are summed along one axis after the other.
    assert planned.step.sent[("process",), "all-reduce"] > 5 * tokens
    # Every device updates its half of a weight and is sent the other.
    halves = [
        x.addressable_shards[0].data.nbytes
        for x, y in zip(*map(jax.tree.leaves, (state.params, state.ema)), strict=True)
        if held(x) != held(y)
    ]
    assert planned.step.sent[("data",), "all-gather"] == sum(halves)


LAYERS = {"model.num_process_layers": 4, "model.num_decoder_layers": 3}


@pytest.mark.slow
@pytest.mark.parametrize("axis", list(SIZES))
def test_what_many_layers_send_is_extrapolated_from_one_and_two(axis):
    """Bytes sent and stored are those of the whole executable; its memory is close."""
    experiment = experiment_of({"data": 1}, **LAYERS)
    mesh = mesh_of(**{axis: SIZES[axis]})
    run = slam_v3_run(experiment, VOCAB, shaped(make_batch(np.float32)))
    planned, layers = extrapolated(run, functools.partial(compiled_step, mesh=mesh))
    assert [tuple(each.values()) for each in layers] == [(1, 1), (2, 1), (1, 2)]
    whole = compiled_step(run, mesh)
    assert whole.sent == planned.sent and whole.activations == planned.activations
    assert whole.taken == pytest.approx(planned.taken, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "moe", "deepseek_v2"])
def test_what_many_layers_of_a_language_model_send_is_extrapolated_from_two(name):
    mesh = mesh_of(fsdp=2, tensor=2)
    run = LanguageRun(name, "tiny", 4, 16, {"num_layers": 5}).subject()
    planned, _ = extrapolated(run, functools.partial(compiled_step, mesh=mesh))
    whole = compiled_step(run, mesh)
    assert whole.sent == planned.sent and whole.activations == planned.activations


@pytest.mark.parametrize(
    ("axis", "policies"),
    [
        ("data", (None,)),
        pytest.param("data", (None, "maps", "layers"), marks=slow),
        pytest.param("fsdp", (None, "maps", "layers"), marks=slow),
    ],
)
def test_devices_share_the_activations_of_a_batch(axis, policies):
    """The fewer are stored, the more are recomputed; a device stores those of its rows alone."""
    planned = []
    for remat in policies:
        run = LanguageRun("standard", "tiny", 8, 16, {"remat": remat}).subject()
        whole = compiled_step(run, None).activations
        assert compiled_step(run, mesh_of(**{axis: 4})).activations * 4 == whole
        planned.append(whole)
    assert planned == sorted(planned, reverse=True)


def test_a_search_plans_the_cheapest_mesh_that_fits(monkeypatch):
    """Every mesh of 8 that shares the heads is asked for; the fastest of all does not fit."""
    run = LanguageRun("standard", "tiny", 8, 16).subject()
    real, asked = plan_step(run, None), []

    def planned(subject: Any, mesh: Any, machine: Machine) -> Any:
        asked.append(tuple(mesh.shape.values()))
        many = 2**40 if mesh.shape["data"] == 8 else 0
        return real._replace(
            sizes=dict(mesh.shape),
            step=real.step._replace(taken=many, activations=many),
            flops=1e12 * (1 + mesh.shape["fsdp"] + 2 * mesh.shape["tensor"]),
        )

    monkeypatch.setattr("slam_jax.planning.meshes.plan_step", planned)
    found = search(run, Machine(), 100)
    assert sorted(asked) == sorted(s for s in factors(8, 4) if s[2] == 1 and s[3] <= 4)
    assert found.tried == found.holding == len(asked) == 9
    assert found.plans[0].sizes == {"data": 4, "fsdp": 1, "process": 1, "tensor": 2} or (
        found.plans[0].sizes == {"data": 4, "fsdp": 2, "process": 1, "tensor": 1}
    )
    assert found.plans[-1].exceeding == 2 and found.plans[-1].sizes["data"] == 8
    seconds = [plan.step_seconds for plan in found.plans[:-1]]
    assert seconds == sorted(seconds)
    asked.clear()
    search(run, Machine(), 2)
    assert len(asked) == 2


def test_a_search_without_room_for_the_state_says_so():
    run = LanguageRun("standard", "tiny", 8, 16).subject()
    with pytest.raises(ConfigError, match="no mesh of 8 devices holds the state in 1e-06 GiB"):
        search(run, Machine(device_memory_gib=1e-6), 1)


# --- A run


def test_a_batch_that_devices_cannot_share_is_refused(run_config, tmp_path):
    for changes, message in (
        (
            ["process=1"],
            "data.batch_size is 4; expected a multiple of 8, optimizer.accumulate_steps times",
        ),
        (["process=8"], "mesh.process is 8; expected a divisor of model.num_processes=4"),
    ):
        config = override(run_config, [f"--config.mesh.{change}" for change in changes])
        with pytest.raises(ConfigError, match=message):
            train(config, tmp_path)


@pytest.fixture
def run_config(tmp_path):
    config = read_config(Path(__file__).parent / "configs" / "small_run.py")
    changes = {"data.data_dir": str(tmp_path / "data"), "run.num_steps": 6, "run.evaluate_every": 3}
    return override(config, [f"--config.{name}={value}" for name, value in changes.items()])


def test_a_language_model_trains_alike_on_one_device_and_on_eight(tmp_path, monkeypatch):
    config: Any = default_language_config()
    config.language_model.preset, config.data.vocab_size = "tiny", 300
    config.data.path = str(write_texts(tmp_path / "texts", 30))
    config.data.length, config.data.batch_size = 16, 8
    config.run.num_steps = config.run.evaluate_every = 3
    config.run.log_every, config.mesh.fsdp = 1, 2
    state = train(config, tmp_path / "eight")
    assert held(state.params["head"]["kernel"]) == (16, 300)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda *given: None)
        train(config, tmp_path / "alone")

    def figures(name: str) -> list[Any]:
        return [r.get("total", r.get("loss")) for r in read_metrics(tmp_path / name)]

    alone, eight = (
        np.array([x for x in figures(name) if x is not None]) for name in ("alone", "eight")
    )
    assert len(alone) == 4  # three steps and the validation
    np.testing.assert_allclose(eight, alone, rtol=1e-4)


@pytest.mark.slow
def test_a_run_resumes_on_other_devices(run_config, tmp_path, monkeypatch, capsys):
    def on(**sizes: int) -> Any:
        return override(run_config, [f"--config.mesh.{a}={size}" for a, size in sizes.items()])

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda *given: None)
        train(run_config, tmp_path / "alone")
    validate = slam_v3_task.validate

    def killed_at_the_second(experiment, graphdef, state, *more):
        if int(state.step) == 6:
            raise KeyboardInterrupt
        return validate(experiment, graphdef, state, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(slam_v3_task, "validate", killed_at_the_second)
        train(on(process=4), tmp_path / "moved")
    assert Checkpoints(tmp_path / "moved").steps() == [3]
    state = train(on(process=1, fsdp=2, tensor=2), tmp_path / "moved")
    assert held(state.params["head"]["kernel"])[0] == 16
    shown = capsys.readouterr().out
    assert "parameters on data 2 x process 4, in" in shown
    assert "parameters on data 2 x fsdp 2 x tensor 2, from step 3 of" in shown

    def losses(name: str) -> list[float]:
        records = read_metrics(tmp_path / name)
        assert [r["step"] for r in records if r["split"] == "validation"] == [3, 6]
        return [r["total"] for r in records if r["split"] == "train"]

    assert load(tmp_path / "moved", "latest").step == 6
    assert len(losses("moved")) == 6
    np.testing.assert_allclose(losses("moved"), losses("alone"), rtol=1e-3)


@pytest.mark.slow
def test_a_run_on_published_parts_is_that_of_one_device(run_config, tmp_path):
    """A frozen language model with adapters, which resumes on other devices, and a run that begins
    with its weights."""
    write_language_model(tmp_path / "lm")
    changes: dict[str, Any] = {
        "data.batch_size": 8,
        "run.num_steps": 4,
        "run.evaluate_every": 2,
        "run.evaluate_batches": 1,
        "run.save_every": None,
        "model.decoder.pretrained": str(tmp_path / "lm"),
        "model.lora.rank": 2,
        "model.lora.patterns": ("decoder/language_model/blocks/*/attention/query", "processes"),
    }
    config = override(run_config, [f"--config.{name}={value}" for name, value in changes.items()])

    def on(workdir: str, *given: str, **sizes: int) -> Any:
        axes = [f"--config.mesh.{axis}={size}" for axis, size in sizes.items()]
        return train(override(config, [*axes, *given]), tmp_path / workdir)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda *given: None)
        alone = on("alone")
        begun = on("begun_alone", f"--config.run.init_from={tmp_path / 'alone'}")
    on("moved", data=1, fsdp=2, process=2, tensor=2)
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "4")
    moved = on("moved", data=2, process=4)
    again = on("begun", f"--config.run.init_from={tmp_path / 'alone'}", fsdp=4, process=2)
    for states, workdirs in (
        ((moved, alone), ("moved", "alone")),
        ((again, begun), ("begun", "begun_alone")),
    ):
        assert_same(jax.device_get(states[0].frozen), jax.device_get(states[1].frozen))
        losses = [
            [r["total"] for r in read_metrics(tmp_path / name) if r["split"] == "train"]
            for name in workdirs
        ]
        assert len(losses[0]) == 4
        np.testing.assert_allclose(*losses, rtol=1e-4)
    saved = by_name(Checkpoints(tmp_path / "moved").read_shapes(4))
    assert not any("lora" not in name for name in saved if "params/decoder/language_model" in name)
    assert not any(name.startswith("frozen/decoder/language_model") for name in saved)
