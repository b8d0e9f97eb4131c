"""Where arrays stand on many devices; what needs several of them is in eight_devices.py."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from slam_jax.errors import ConfigError
from slam_jax.language_models.registry import SYSTEMS, make_config, make_model
from slam_jax.layers.constrain import constrain, fit
from slam_jax.layers.lora import LoraConfig
from slam_jax.planning.collectives import Collective, collectives
from slam_jax.runtime.memory import require_memory
from slam_jax.slam_v3 import SlamV3, SlamV3Config
from slam_jax.slam_v3.config import DecoderConfig, ImageConfig
from slam_jax.training import default_config, override, split_model
from slam_jax.training.checkpoint.trees import by_name
from slam_jax.training.experiment import Experiment, as_json
from slam_jax.training.mesh import MeshConfig, make_mesh, more_fsdp, resolve
from slam_jax.training.optimizer import OPTIMIZERS
from slam_jax.training.sharding import RULES, matching_rules, place
from slam_jax.training.slam_v3_task import SlamV3Task
from slam_jax.training.start import state_shapes
from slam_jax.vision_models import VisionConfig, VisionTower

FILE = Path(__file__).with_name("eight_devices.py")


def on_eight_devices(*arguments: str) -> None:
    # A process of its own: a process has the devices that it starts with.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", FILE, *arguments],
        cwd=FILE.parents[1],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=3_600,
    )
    assert done.returncode == 0, done.stdout[-5_000:] + done.stderr[-2_000:]


@pytest.mark.release
def test_several_devices_do_what_one_does():
    on_eight_devices()


@pytest.mark.slow
def test_several_devices_do_what_one_does_for_every_model_and_pair_of_axes():
    on_eight_devices("-m", "slow")


@pytest.mark.slow
def test_a_plan_is_told_in_a_few_lines(tmp_path):
    def plan(*changes: str) -> subprocess.CompletedProcess:
        config = FILE.parent / "configs" / "small_run.py"
        given = [f"--config.{change}" for change in (f"data.data_dir={tmp_path}", *changes)]
        command = [sys.executable, "-m", "slam_jax.planning", "--devices=8", f"--config={config}"]
        root = FILE.parents[1]
        return subprocess.run([*command, *given], cwd=root, capture_output=True, text=True)

    done = plan("mesh.process=4")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("on each of 8 devices")
    for start, end in (("parameters", "exact"), ("all-reduce along process", "compiled")):
        assert any(line.startswith(start) and line.endswith(end) for line in lines)
    refused = plan("mesh.process=1")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: data.batch_size is 4; expected a multiple of 8")


# --- The table


def v3(lora=(), **image):
    adapters = LoraConfig(2 * bool(lora), patterns=lora)
    wide = dict(num_memory_tokens=3, aux_slots=True, image=dict(size=24, **image), lora=adapters)
    return SlamV3(SlamV3Config.preset("tiny", 13, **wide), rngs=nnx.Rngs(0))


def tower(kind, **changes):
    sizes = dict(image_size=32, patch_size=8, embed_dim=48, mlp_dim=96, num_layers=2, num_heads=4)
    return VisionTower(VisionConfig(model_type=kind, **{**sizes, **changes}), rngs=nnx.Rngs(0))


def on_published_parts(system):
    """SLAM v3 with a language model as the decoder and a vision tower."""
    sizes: Any = dict(image_size=32, patch_size=8, embed_dim=48, mlp_dim=96, num_layers=2)
    kind = VisionConfig(model_type="siglip_vision_model", num_heads=4, **sizes)
    image = ImageConfig(size=32, pretrained="folder", tower=kind)
    decoder = DecoderConfig("folder", 2, system, make_config(system, "tiny"))
    config = SlamV3Config.preset("tiny", 13, image=image, decoder=decoder)
    return SlamV3(config, rngs=nnx.Rngs(0))


OPTIONS = SlamV3Config.preset(
    "tiny",
    13,
    num_memory_tokens=3,
    num_bottleneck_blocks=1,
    num_process_layers=2,
    qk_norm=True,
    decoder_input_norm=True,
    text_kernel_size=3,
)
MODELS = {
    "slam_v3": v3,
    "slam_v3, vit": lambda: v3(encoder="vit", max_images=2),
    "slam_v3, adapters": lambda: v3(lora=("*",)),
    "slam_v3, options": lambda: SlamV3(OPTIONS, rngs=nnx.Rngs(0)),
    **{
        f"slam_v3, {name}": lambda name=name: on_published_parts(name)
        for name in ("standard", "deepseek_v2", "jamba")
    },
    **{
        name: lambda name=name: make_model(make_config(name, "tiny"), rngs=nnx.Rngs(0))
        for name in SYSTEMS
    },
    **{
        f"{kind}, {extra}": lambda kind=kind, extra=extra: tower(kind, **extra)
        for kind, extra in (
            ("clip_vision_model", {}),
            ("siglip_vision_model", {"scan_layers": True}),
            ("dinov2_with_registers", {"num_registers": 2, "swiglu": True}),
        )
    },
    "qwen2, biases": lambda: make_model(
        make_config("standard", "tiny", qkv_bias=True, out_bias=True, mlp_bias=True),
        rngs=nnx.Rngs(0),
    ),
    "jamba, biases": lambda: make_model(
        make_config("jamba", "tiny", proj_bias=True), rngs=nnx.Rngs(0)
    ),
}


@pytest.fixture(scope="module")
def shapes():
    """System -> parameter -> its shape."""
    made = {name: nnx.eval_shape(model) for name, model in MODELS.items()}
    return {name: by_name(split_model(model)[1]) for name, model in made.items()}


@pytest.mark.release
def test_every_parameter_of_every_system_has_exactly_one_rule(shapes):
    wrong = {
        f"{system}: {path}": rules
        for system, parameters in shapes.items()
        for path in parameters
        if len(rules := matching_rules(path)) != 1
    }
    assert not wrong


@pytest.mark.release
def test_every_rule_is_of_some_parameter_and_names_no_more_than_its_dimensions(shapes):
    paths = {path: x.ndim for parameters in shapes.values() for path, x in parameters.items()}
    for pattern, axes in RULES:
        ndims = [n for path, n in paths.items() if re.search(rf"(^|/){pattern}$", path)]
        assert ndims, pattern
        assert len(axes) - (... in axes) <= min(ndims), pattern


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_has_its_place(name):
    config: Any = default_config("tiny")
    config.optimizer.name = name
    _, state = state_shapes(
        SlamV3Task(Experiment.from_config(config)), 13, jax.make_mesh((1,), ("fsdp",))
    )
    assert all(x.sharding.mesh.size == 1 for x in jax.tree.leaves(state))


# --- The mesh


@pytest.mark.parametrize(
    ("sizes", "num_devices", "expected"),
    [
        ({}, 8, (2, 1, 4, 1)),
        ({}, 6, (3, 1, 2, 1)),
        ({}, 7, (7, 1, 1, 1)),
        ({}, 1, (1, 1, 1, 1)),
        ({"data": 8}, 8, (8, 1, 1, 1)),
        ({"data": 4}, 8, (4, 1, 2, 1)),
        ({"fsdp": 4}, 8, (1, 4, 2, 1)),
        ({"process": 1}, 8, (8, 1, 1, 1)),
        ({"process": 4}, 8, (2, 1, 4, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, 8, (1, 4, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (2, 2, 1, 2)),
    ],
)
def test_sizes_are_those_given_and_what_is_left(sizes, num_devices, expected):
    assert tuple(resolve(MeshConfig(**sizes), num_devices, 4).values()) == expected


@pytest.mark.parametrize(
    ("sizes", "num_devices", "message"),
    [
        ({"process": 3}, 8, "mesh is data -1 x fsdp 1 x process 3 x tensor 1, and the number of "),
        ({"process": 3}, 8, "number of devices is 8; expected mesh.process=1 or 2 or 4 or 8$"),
        (
            {"data": 1, "fsdp": 3},
            6,
            "expected mesh.data=2; or mesh.fsdp=6; or mesh.process=2",
        ),
        ({"data": 3, "fsdp": 3}, 8, "is 8; expected sizes whose product is 8$"),
        ({"process": 4}, 1, "is 1; expected mesh.process=1$"),
    ],
)
def test_a_wrong_product_says_which_sizes_would_fit(sizes, num_devices, message):
    with pytest.raises(ConfigError, match=message):
        resolve(MeshConfig(**sizes), num_devices)


def test_devices_that_cannot_be_laid_out_are_told_in_a_line(monkeypatch):
    def refuse(*args, **more):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 3")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    message = "data 2 x fsdp 1 x process 1 x tensor 1, and the devices .* arranged .*Failed to find"
    with pytest.raises(ConfigError, match=message):
        make_mesh(MeshConfig(), devices=[None, None])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("fsdp=0", "mesh.fsdp is 0; expected at least 1"),
        ("fsdp=-1", "mesh is 'data, fsdp'; expected one field of -1 at most"),
        ("zero=1", "mesh.zero is 1; expected True or False"),
    ],
)
def test_a_mesh_that_cannot_be_is_named(argument, message):
    config = override(as_json(default_config("tiny")), [f"--config.mesh.{argument}"])
    with pytest.raises(ConfigError, match=re.escape(message)):
        Experiment.from_config(config)


def test_where_a_state_does_not_fit_its_division_is_proposed():
    assert more_fsdp({"data": 1, "fsdp": 8}) == ""
    with pytest.raises(
        ConfigError, match=r"are .*; divide it by mesh\.data=1 and mesh\.fsdp=8, or c"
    ):
        require_memory(2**60, "the training state", more_fsdp({"data": 4, "fsdp": 2}))


def test_one_device_has_no_mesh_and_is_told_nothing():
    assert make_mesh(MeshConfig(), 4, jax.devices()[:1]) is None
    x = jnp.ones((4, 2))
    assert constrain(x, ("batch",)) is x
    assert place(x, None, 4) is x
    jaxpr = jax.make_jaxpr(lambda x: constrain(x, ("batch",)))(x)
    assert not jaxpr.eqns


def test_an_axis_that_does_not_divide_is_left_out():
    sizes = {"data": 2, "fsdp": 4, "tensor": 3}
    batch = ("data", "fsdp")
    assert fit((16, 6), [batch, ("tensor",)], sizes) == PartitionSpec(batch, "tensor")
    assert fit((6, 6), [batch], sizes) == PartitionSpec("data")
    assert fit((12, 7), [("fsdp",), ("tensor",)], sizes) == PartitionSpec("fsdp", None)
    assert fit((4, 4), [("process",)], sizes) == PartitionSpec(None)
    assert fit((4, 4), [], sizes) == PartitionSpec()
    assert fit((4, 4), [("data",), ("data", "fsdp")], sizes) == PartitionSpec("data", "fsdp")


# --- What devices send each other

TEXT = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body.1 (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %gather = f32[8,4]{1,0} all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %scatter = bf16[2,4]{1,0} reduce-scatter(%gather), replica_groups={{0,1,2,3},{4,5,6,7}}
}

%condition (state: (s32[], f32[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%few (x: f32[2]) -> f32[2] {
  ROOT %small = f32[2]{0} all-reduce(%x), replica_groups={}, to_apply=%add
}

%many (x: f32[2]) -> f32[2] {
  %large = f32[64]{0} all-to-all(%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %both = (f32[3]{0}, pred[5]{0}) all-reduce(%p, %q), replica_groups=mesh['a'=2,'b'=4] {'b'}, metadata={op_name="jit(step)/sum"}
  %loop = (s32[], f32[8,4]) while(%t), condition=%condition, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %branch = f32[2]{0} conditional(%i, %x, %x), branch_computations={%few, %many}
  ROOT %shift = s8[16]{0} collective-permute(%y), source_target_pairs={{0,0},{1,5},{5,1}}
}
"""  # noqa: E501


def test_collectives_are_read_with_their_axes_and_as_often_as_they_run():
    found = collectives(TEXT, {"data": 2, "process": 4})
    assert found == [
        Collective("all-reduce", ("process",), 3 * 4 + 5, 1, "jit(step)/sum"),
        Collective("all-gather", ("data",), 8 * 4 * 4, 5, ""),
        Collective("reduce-scatter", ("process",), 4 * 2 * 4 * 2, 5, ""),
        Collective("all-to-all", ("process",), 64 * 4, 1, ""),
        Collective("collective-permute", ("data",), 16, 1, ""),
    ]
    unknown = TEXT.replace("replica_groups={{0,1,2,3},{4,5,6,7}}", "replica_groups=new")
    with pytest.raises(ValueError, match="in an unknown form: %scatter = bf16"):
        collectives(unknown, {"data": 2, "process": 4})
