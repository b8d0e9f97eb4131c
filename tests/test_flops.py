"""The operations counted by formula are those of the products in the traced functions."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from slam_jax.kernels.backend import for_accelerators
from slam_jax.language_models import SYSTEMS, make_config, make_model
from slam_jax.language_models.flops import forward_flops, training_flops
from slam_jax.slam_v3 import Inputs, SlamV3, SlamV3Config
from slam_jax.slam_v3.config import PARTS, DecoderConfig
from slam_jax.slam_v3.flops import decode_flops, encode_flops, num_memory
from slam_jax.training.flops import input_sizes
from slam_jax.vision_models import Preprocessing, VisionConfig

pytestmark = pytest.mark.release

LENGTH = 6


def brute(jaxpr: Any, in_scan: bool = False) -> int:
    """The operations of every matrix product, counted as often as its loop runs; inside loops also
    those on arrays of three axes, which are Mamba's recurrence."""
    total = 0
    for eqn in jaxpr.eqns:
        name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
        assert name not in ("while", "cond"), "how often does it run?"
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += (
                2 * math.prod(shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            )
        elif name == "ragged_dot_general":
            total += 2 * math.prod(shape) * eqn.invars[0].aval.shape[-1]
        elif name == "conv_general_dilated":
            window = eqn.invars[1].aval.shape  # height, width, in, out
            total += 2 * math.prod(shape) * math.prod(window[:3])
        elif in_scan and name in ("mul", "add") and len(shape) == 3:
            total += math.prod(shape)
        elif in_scan and name == "reduce_sum" and len(eqn.invars[0].aval.shape) == 3:
            total += math.prod(eqn.invars[0].aval.shape)
        loops = eqn.params["length"] if name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
                if isinstance(inner, Jaxpr):
                    total += loops * brute(inner, in_scan=in_scan or name == "scan")
    return total


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_formula_counts_every_product(name):
    changes: dict[str, Any] = {}
    if hasattr(SYSTEMS[name].config, "num_experts"):
        # As many that each choice has an expert's weights to itself: nothing is padded then.
        changes["num_experts"] = 3 * LENGTH
    if name == "deepseek_v2":
        changes |= {"num_groups": 3, "top_groups": 2}
    if name == "slam_v3_text":
        changes["text_window"] = LENGTH // 3
    config = make_config(name, "tiny", **changes)
    model = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    with for_accelerators():
        traced = jax.make_jaxpr(lambda model, tokens: model(tokens).logits)(model, tokens)
    found = brute(traced.jaxpr)
    expected = forward_flops(config, LENGTH)
    if name == "jamba":
        # Shifted products of whole arrays, which nothing tells from others; and the last chunk of
        # the scan is filled up.
        width = config.expand * config.embed_dim
        mamba = sum(not config.has_attention(i) for i in range(config.num_layers))
        expected -= mamba * 2 * LENGTH * width * config.conv_width
        expected += mamba * 6 * (32 - LENGTH) * width * config.state_dim
    assert found == expected


def test_training_takes_three_times_as_much():
    config = make_config("moe", "tiny")
    assert training_flops(config, 9) == 3 * forward_flops(config, 9)


def test_attention_grows_with_the_square_and_mamba_does_not():
    small, large = 1_000, 4_000
    for name, power in (("standard", 2), ("jamba", 1), ("slam_v3_text", 1)):
        changes = {"num_layers": 2} if name == "jamba" else {}
        config = make_config(name, "tiny", **changes)
        growth = forward_flops(config, large) / forward_flops(config, small)
        assert np.log(growth) / np.log(large / small) == pytest.approx(power, abs=0.25)


def tower(**changes: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = dict(
        image_size=24, patch_size=8, embed_dim=16, mlp_dim=40, num_layers=2, num_heads=2
    )
    return {
        "tower": VisionConfig(**{**sizes, **changes}),
        "preprocessing": Preprocessing(size=(24, 24)),
    }


def decoder(system: str, **changes: Any) -> DecoderConfig:
    return DecoderConfig(
        system=system, language_model=make_config(system, "tiny", **changes), memory_every=2
    )


VIEWS: dict[str, dict[str, Any]] = {
    "text": {"text": 5},
    "aux": {"aux": 3},
    "all": {"text": 5, "pixels": (24, 17), "aux": 3},
    "several": {"text": 5, "pixels": (24, 17), "images": 3, "aux": 3},
}


@pytest.mark.parametrize(
    ("view", "changes"),
    [
        *((view, {}) for view in ("text", "aux", "all")),
        ("all", {"num_memory_tokens": 4, "q_lora_rank": None, "num_process_layers": 2}),
        ("all", {"image": {"encoder": "vit", "size": 24, "patch_size": 8, "num_layers": 2}}),
        ("all", {"image": {"size": 24, "stage_widths": (8, 8, 16), "blocks_per_stage": 2}}),
        ("several", {"image": {"size": 24, "stage_widths": (8, 16), "max_images": 3}}),
        (
            "several",
            {"image": {"encoder": "vit", "size": 24, "patch_size": 8, "max_images": 4}},
        ),
        ("text", {"process_mlp_dim": 20, "num_processes": 2, "text_kernel_size": 0}),
        ("all", {"rotate_all_streams": False}),
        ("all", {"num_memory_tokens": 4, "num_bottleneck_blocks": 2, "qk_norm": True}),
        *(("all", {"without": (part,)}) for part in PARTS),
        ("all", {"image": tower(model_type="siglip_vision_model")}),
        ("all", {"image": tower(model_type="dinov2", num_registers=3, swiglu=True)}),
        ("all", {"decoder": decoder("standard")}),
        ("text", {"decoder": decoder("deepseek_v2", num_dense_layers=3), "num_memory_tokens": 4}),
    ],
)
def test_slam_v3_counts_every_product(view, changes):
    config = SlamV3Config.preset("tiny", 13, **changes)
    sizes = dict(VIEWS[view])
    if config.image.encoder != "resnet" and "pixels" in sizes:
        sizes["pixels"] = (24, 24 if config.tower else 16)

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    several = (sizes["images"],) if "images" in sizes else ()
    inputs: Any = Inputs(
        text=array((sizes["text"],), jnp.int32) if "text" in sizes else None,
        image=array((*several, *sizes["pixels"], 3), jnp.uint8) if "pixels" in sizes else None,
        aux=array((sizes["aux"], config.aux_dim), jnp.float32) if "aux" in sizes else None,
    )
    assert input_sizes(inputs) == sizes
    model = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
    encode = jax.make_jaxpr(SlamV3.encode)(model, inputs)
    memory = jax.eval_shape(SlamV3.encode, model, inputs)
    # Shifted products of whole arrays, which nothing tells from others.
    shifted = 2 * sizes.get("text", 0) * config.text_kernel_size * config.embed_dim
    assert brute(encode.jaxpr) + shifted == encode_flops(config, **sizes)
    tokens = array((2, LENGTH), jnp.int32)
    decode = jax.make_jaxpr(SlamV3.decode)(model, tokens, memory)
    found = memory.c_mem.shape[1]
    assert brute(decode.jaxpr) == decode_flops(config, prompts=2, length=LENGTH, memory=found)
    assert num_memory(config, **sizes) == found
