"""The planner's parts that need one device; what needs several is in eight_devices.py."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from slam_jax.data import Batch
from slam_jax.errors import ConfigError
from slam_jax.language_models import make_config
from slam_jax.language_models.flops import training_flops
from slam_jax.layers.linear import Linear
from slam_jax.planning.compiled import Step, extrapolated, residuals
from slam_jax.planning.machine import Machine
from slam_jax.planning.meshes import factors
from slam_jax.planning.plans import Plan, StateBytes
from slam_jax.planning.report import describe
from slam_jax.planning.subjects import LanguageRun, Subject, slam_v3_run, subject_of
from slam_jax.slam_v3 import Inputs
from slam_jax.slam_v3.flops import decode_flops, encode_flops
from slam_jax.training import Experiment, default_config, merge_model, read_config, split_model

ROOT = Path(__file__).parents[1]
SIZES = {"data": 4, "fsdp": 2, "process": 1, "tensor": 8}
MACHINE = Machine(device_memory_gib=1.0, device_tflops=1.0, link_gb_s=100.0, network_gb_s=10.0)


def run_of(**changes: Any) -> Subject:
    config: Any = default_config("tiny")
    config.data.batch_size = 8
    config.loss.alignment = 0.1
    for name, value in changes.items():
        config.model[name] = value

    def array(*shape: int, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct((8, *shape), dtype)

    inputs = Inputs(text=array(6), image=array(24, 24, 3, dtype=np.uint8))
    batch = Batch(inputs, array(2, 7), array(2), array(2), paired=True)
    return slam_v3_run(Experiment.from_config(config), 13, batch)


def plan_of(taken: int = 0, activations: int = 0, **sent: int) -> Plan:
    """2 GiB of parameters and 4 of optimizer on devices of 1 GiB."""
    found = {((name,), "all-reduce"): num_bytes for name, num_bytes in sent.items()}
    step = Step(taken, activations, found)
    return Plan(SIZES, StateBytes(2**31, 2**32, 0), step, 2e12, MACHINE, [{}])


def test_a_ring_within_a_host_has_its_links_and_one_beyond_it_the_cards():
    assert MACHINE.bandwidth(("tensor",), SIZES) == 100e9
    # Neighbours along data or fsdp are eight devices apart: each in a host of its own.
    assert MACHINE.bandwidth(("fsdp",), SIZES) == MACHINE.bandwidth(("data",), SIZES) == 10e9
    # All eight of a host, with as many cards.
    assert MACHINE.bandwidth(("fsdp", "tensor"), SIZES) == 80e9
    wide = dataclasses.replace(MACHINE, devices_per_host=16)
    assert wide.bandwidth(("fsdp",), SIZES) == 100e9
    assert wide.bandwidth(("data", "fsdp"), SIZES) == 20e9


@pytest.mark.parametrize(
    ("op", "share"),
    [
        ("all-reduce", 7 / 4),
        ("all-gather", 7 / 8),
        ("reduce-scatter", 7 / 8),
        ("all-to-all", 7 / 8),
    ],
)
def test_a_ring_sends_each_byte_nearly_once_and_a_sum_nearly_twice(op, share):
    found = MACHINE.seconds({(("tensor",), op): 100_000_000_000}, SIZES)
    assert found == {(("tensor",), op): pytest.approx(share)}


def test_a_step_is_its_operations_and_what_it_sends():
    plan = plan_of(tensor=100_000_000_000, data=10_000_000_000)
    assert plan.seconds == pytest.approx(
        {"compute": 2.0, "all-reduce along tensor": 7 / 4, "all-reduce along data": 3 / 2}
    )
    assert plan.step_seconds == pytest.approx(5.25)
    assert any(
        line.split() == ["of", "it", "compute", "38.1%", "estimated"]
        for line in describe(plan).splitlines()
    )


def test_a_plan_says_whether_it_fits_and_what_is_exact():
    """Needed are 9 GiB: the state, gradients of 2 and activations of 1; taken are 26."""
    plan = plan_of(taken=20 * 2**30, activations=2**30)

    def of_memory(gib: float) -> Plan:
        return plan._replace(machine=dataclasses.replace(MACHINE, device_memory_gib=gib))

    found = {gib: of_memory(gib).exceeding for gib in (8.9, 9.0, 25.9, 26.0)}
    assert found == {8.9: 2, 9.0: 1, 25.9: 1, 26.0: 0}
    assert "may fit: 90.0% of 10 GiB are needed, 260.0% are taken here" in describe(of_memory(10.0))
    assert "does not fit: 900.0% of 1 GiB are needed" in describe(plan)
    assert "; divide it by mesh.data=1 and mesh.fsdp=8, or take smaller" in describe(plan)
    text = describe(of_memory(52.0))
    assert "\nfits: 17.3% of 52 GiB" in text
    rows = {line.split()[0]: line.split()[-1] for line in text.splitlines()[1:8]}
    for name in ("parameters", "optimizer", "average", "gradients"):
        assert rows[name] == "exact"
    assert rows["activations"] == rows["needed"] == "counted" and rows["taken"] == "estimated"
    assert "1,024 virtual" not in text and "for all 64 virtual CPU devices" in text


def test_activations_are_what_differentiation_keeps_of_the_examples():
    """Of exp(x W) masked: x for the gradient of W, the exponential for its own; no mask, and not
    what the square of W keeps."""
    graphdef, params = split_model(Linear(3, 5, rngs=nnx.Rngs(0)))

    def loss(params: Any, x: Any) -> Any:
        y = jnp.exp(merge_model(graphdef, params)(x))
        decay = jnp.sum(jnp.square(params["kernel"]))
        return decay + jnp.sum(jnp.where(jnp.arange(5) < 3, y, 0.0))

    kept = residuals(loss, params, jax.ShapeDtypeStruct((4, 3), jnp.float32))
    assert sorted((x.shape, str(x.dtype)) for x in kept) == [
        ((4, 3), "float32"),
        ((4, 5), "float32"),
    ]


def test_operations_are_those_of_the_formula():
    run = run_of()
    model, sizes = run.config, {"text": 6, "pixels": (24, 24)}
    memory = 6 + 16
    forward = decode_flops(model, prompts=2, length=6, memory=memory)
    forward += encode_flops(model, **sizes)
    forward += encode_flops(model, text=6) + encode_flops(model, pixels=(24, 24))
    assert run.flops.total == 3 * 8 * forward
    assert run_of(remat="layers").flops.total == 4 * 8 * forward
    # A process less takes nothing but its layers, and its part of W_cat.
    fewer = run_of(num_processes=3).flops
    assert fewer.process == run.flops.process * 3 // 4
    language = LanguageRun("moe", "tiny", 4, 9)
    assert language.subject().flops.total == 4 * training_flops(make_config("moe", "tiny"), 9)
    config = make_config("moe", "tiny")
    again = dataclasses.replace(language, model={"remat": "layers"}).subject()
    assert again.flops.total == 4 * (training_flops(config, 9) + config.body_flops(9))


def test_of_a_run_the_largest_view_is_planned_and_named(tmp_path):
    """Not the first one, of two columns: 16 tokens of an image and 2; with the alignment loss that
    of an image and a letter, which are encoded once more."""
    config: Any = default_config("tiny")
    rows = []
    for i in range(6):
        Image.new("RGB", (24, 24), (i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "text": "x", "width": i, "price": i, "answer": "a"})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config.data.name, config.data.path, config.data.batch_size = "folder", str(tmp_path), 4
    later = {"image": 1.0, "text": 1.0, "image_text": 1.0, "image_aux": 1.0}
    config.data.stages = ((0, {"aux": 1.0}), (5, later))
    config.model.aux_slots, config.model.image.size = True, 24
    run: Any = subject_of(config)
    assert run.view == "image_aux" and run.batch.inputs.image.shape == (4, 24, 24, 3)
    config.loss.alignment = 0.1
    assert subject_of(config).view == "image_text"
    first = describe(plan_of()._replace(view="image_text")).splitlines()[0]
    assert first.endswith("tensor 8, view image_text: on each of 64 devices")


def test_an_axis_divides_no_more_than_it_can():
    flops = run_of().flops
    own, rest = flops.process, flops.total - flops.process
    assert flops.of_device({"data": 2, "fsdp": 4}, 2, 8) == flops.total / 8
    assert flops.of_device({"data": 2, "process": 4}, 2, 8) == flops.total / 8
    assert flops.of_device({"process": 4, "tensor": 2}, 2, 6) == (own / 4 + rest) / 2
    assert flops.of_device({"tensor": 4}, 2, 8) == flops.total


def test_layers_are_added_from_the_first_two():
    run = dataclasses.replace(run_of(num_process_layers=5, num_decoder_layers=4))

    def measure(run: Any) -> Step:
        model = run.config
        deep, wide = model.num_process_layers, model.num_decoder_layers
        sent = {(("data",), "all-reduce"): 7 + 3 * deep, (("fsdp",), "all-gather"): 11 * wide - 11}
        return Step(100 + 10 * deep + wide, 7 * deep + 13 * wide, sent)

    found, layers = extrapolated(run, measure)
    assert found == measure(run)
    assert [tuple(each.values()) for each in layers] == [(1, 1), (2, 1), (1, 2)]
    shallow = run_of(num_process_layers=2)
    assert extrapolated(shallow, measure) == (measure(shallow), [{}])


def test_layers_of_language_models_that_differ_are_not_taken_for_one_another():
    assert LanguageRun("deepseek_v2", "v2", 8, 16).subject().depths["num_layers"] == (1, 1, 59)
    assert LanguageRun("jamba", "large_1.5", 8, 16).subject().depths["num_layers"] == (0, 8, 9)
    assert LanguageRun("hunyuan_large", "large", 8, 16).subject().depths == {}


def test_factors_are_all_products():
    assert sorted(factors(4, 2)) == [(1, 4), (2, 2), (4, 1)]
    assert len(list(factors(256, 4))) == 165


def test_what_is_no_machine_or_no_language_model_is_named():
    with pytest.raises(ConfigError, match="device_tflops is 0.0; expected a number above 0"):
        Machine(device_tflops=0.0)
    with pytest.raises(ConfigError, match="devices_per_host is 0; expected at least 1"):
        Machine(devices_per_host=0)
    config = read_config(ROOT / "configs" / "deepseek_v2_plan.py")
    for field, value, message in (
        ("language_model", "gpt", "the registry of language models has no field 'gpt'"),
        ("num_tokens", 0, "num_tokens is 0; expected at least 1"),
        ("num_tokens", 2**18, "num_tokens is 262144; expected at most 163,840"),
        ("batch_size", 1.5, "batch_size is 1.5; expected a whole number"),
    ):
        with pytest.raises(ConfigError, match=message):
            subject_of({**config, field: value})
