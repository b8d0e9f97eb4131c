"""Where cuDNN's attention is chosen, and that its plain twin is our attention."""

import functools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slam_jax.errors import InputError
from slam_jax.kernels import cudnn_attention
from slam_jax.kernels.backend import cuda_capability
from slam_jax.language_models.registry import SYSTEMS, make_config, make_model
from slam_jax.layers import MultiHeadLatentAttention, attend, latent_attend
from slam_jax.layers.masks import Causal, as_array
from slam_jax.layers.rotary import Rope, Yarn
from slam_jax.training import language_model_loss, merge_model, split_model

LENGTH, WIDTH = 9, 8


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that cuDNN's attention was written for, with the plain twin in its place; how often it
    was called."""
    calls = []

    def twin(*given, **named):
        calls.append(given[0].shape)
        return plain(*given, **named, implementation="xla")

    plain = cudnn_attention.causal_attend
    monkeypatch.setattr(cudnn_attention, "causal_attend", twin)
    monkeypatch.setattr(cudnn_attention, "cuda_capability", lambda: 9.0)
    monkeypatch.setattr(cudnn_attention, "_LEAST_JAX", (0, 0, 0))
    return calls


@pytest.mark.parametrize(
    ("lead", "values", "length", "heads", "window"),
    [
        ((), 5, 9, (4, 2), 3),
        ((2,), WIDTH, 8, (4, 4), None),
        ((2, 3), 11, 9, (4, 1), 1),
    ],
    ids=str,
)
def test_its_twin_is_attention(lead, values, length, heads, window):
    many, few = heads
    q, k = normal(1, *lead, length, many, WIDTH), normal(2, *lead, length, few, WIDTH)
    v, mask = normal(3, *lead, length, few, values), Causal(window)

    def ours(q, k, v):
        return attend(q, k, v, mask.array(length))

    theirs = functools.partial(cudnn_attention.causal_attend, mask=mask, implementation="xla")
    for one, other in zip(
        (ours(q, k, v), *gradients(ours, q, k, v)),
        (theirs(q, k, v), *gradients(theirs, q, k, v)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=2e-5)


def gradients(f, *given):
    return jax.grad(lambda *given: jnp.sum(jnp.sin(f(*given))), (0, 1, 2))(*given)


def test_a_mask_in_words_is_the_array_that_it_stands_for():
    rows = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(Causal(2).array(4), np.array(rows, bool))
    np.testing.assert_array_equal(Causal().array(4), np.tril(np.ones((4, 4), bool)))
    given = jnp.ones((2, 4, 4), bool)
    assert as_array(given, 4, 4) is given
    assert as_array(None, 4, 5) is None
    np.testing.assert_array_equal(as_array(Causal(2), 4, 4), Causal(2).array(4))


def test_words_are_for_as_many_queries_as_keys():
    q, k = normal(1, 2, 1, 4, WIDTH), normal(2, 2, 5, 4, WIDTH)
    with pytest.raises(InputError, match="over 1 queries and 5 keys"):
        attend(q, k, k, Causal())
    with pytest.raises(InputError, match="over 1 queries and 5 keys"):
        latent_attend(
            q, k[..., 0, :], *2 * [normal(3, WIDTH, 4, WIDTH)], mask=Causal(), absorbed=True
        )


# What is changed of queries that fit -> whether they do still.
FITS = {
    "as they are": ({}, True),
    "float32": ({"dtype": jnp.float32}, False),
    "float16": ({"dtype": jnp.float16}, True),
    "short rows": ({"tokens": 127}, False),
    "a width of no 8": ({"width": 60}, False),
    "a wide head": ({"width": 256}, True),
    "a wider one": ({"width": 264}, False),
    "a wide head on Ampere": ({"width": 136, "capability": 8.0}, False),
    "Ampere": ({"capability": 8.0}, True),
    "Turing": ({"capability": 7.5}, False),
    "Blackwell": ({"capability": 10.0}, True),
    "a wide head on Blackwell": ({"width": 136, "capability": 12.0}, False),
    "no rows": ({"rows": 0}, False),
    "a JAX with a fault": ({"jax": (0, 11, 2)}, False),
}


@pytest.mark.parametrize(("changes", "fits"), FITS.values(), ids=FITS)
def test_it_is_chosen_where_it_fits(hopper, monkeypatch, changes, fits):
    has = {"tokens": 128, "width": 64, "dtype": jnp.bfloat16, "capability": 9.0}
    has |= {"jax": (0, 0, 0), "rows": 2} | changes
    monkeypatch.setattr(cudnn_attention, "cuda_capability", lambda: has["capability"])
    monkeypatch.setattr(cudnn_attention, "_LEAST_JAX", has["jax"])
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 1))
    q = jnp.zeros((has["rows"], has["tokens"], 4, 64), has["dtype"])
    assert cudnn_attention.fits(q, has["width"]) is fits


def test_a_cpu_has_no_capability():
    assert cuda_capability() == 0.0


@pytest.mark.parametrize(
    ("device", "capability"),
    [("9.0", 9.0), ("12.1", 12.1), ("gfx90a", 0.0), (None, 0.0)],
    ids=str,
)
def test_only_gpus_of_nvidia_have_a_capability(monkeypatch, device, capability):
    has = {} if device is None else {"compute_capability": device}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(**has)])
    assert cuda_capability.__wrapped__() == capability


QUICK = ("standard", "deepseek_v2", "slam_v4")


@pytest.mark.parametrize(
    "system",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SYSTEMS],
)
def test_a_model_is_the_same_with_it(hopper, monkeypatch, system):
    config = make_config(system, "tiny")
    model = make_model(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, config.vocab_size)

    def loss(tokens):
        return jax.jit(lambda model: model(tokens).logits)(model)

    expected = loss(tokens)
    assert not hopper
    monkeypatch.setattr(cudnn_attention, "fits", lambda q, width: True)
    np.testing.assert_allclose(loss(tokens), expected, atol=2e-5)
    assert hopper


@pytest.mark.parametrize(
    "mask", [None, np.tril(np.ones((2, 128, 128), bool))], ids=["none", "array"]
)
def test_only_a_mask_in_words_asks_for_it(hopper, mask):
    q = normal(1, 2, 128, 4, WIDTH).astype(jnp.bfloat16)
    attend(q, q, q, None if mask is None else jnp.asarray(mask))
    assert not hopper
    attend(q, q, q, Causal())
    assert hopper == [q.shape]


@pytest.mark.parametrize("window", [None, 3])
def test_latent_attention_is_the_same_with_it(hopper, monkeypatch, window):
    """Its scores have a scale of their own."""
    rope = Rope(yarn=Yarn(40.0, 4_096, mscale=0.7, mscale_all_dim=0.7))
    sizes: Any = dict(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
    layer = MultiHeadLatentAttention(16, 4, **sizes, rope=rope, window=window, rngs=nnx.Rngs(0))
    x = normal(1, 2, LENGTH, 16)
    expected = layer(x)
    assert rope.score_scale != 1.0
    assert not hopper
    monkeypatch.setattr(cudnn_attention, "fits", lambda q, width: True)
    np.testing.assert_allclose(layer(x), expected, atol=2e-5)
    assert hopper == [(2, LENGTH, 4, 10)]


def test_rows_with_pads_are_left_to_an_array(hopper, monkeypatch):
    monkeypatch.setattr(cudnn_attention, "_LEAST_TOKENS", LENGTH)
    config = make_config("standard", "tiny", dtype="bfloat16")
    model = make_model(config, rngs=nnx.Rngs(0))
    tokens = jnp.ones((2, LENGTH), jnp.int32)
    model(tokens, jnp.arange(LENGTH)[None] < jnp.array([[9], [4]]))
    assert not hopper
    model(tokens)
    assert hopper == config.num_layers * [(2, LENGTH, config.num_heads, 8)]


def test_values_that_are_wider_than_keys_are_asked_for_too(hopper):
    """160 fit; of 264, which latents may have, none of the kernels takes any."""
    q = normal(1, 1, 128, 2, 64).astype(jnp.bfloat16)
    latents, k_up = normal(2, 1, 128, 8).astype(jnp.bfloat16), jnp.ones((8, 2, 64), jnp.bfloat16)
    for values, called in ((264, 0), (160, 1)):
        v_up = jnp.ones((8, 2, values), jnp.bfloat16)
        y = latent_attend(q, latents, k_up, v_up, mask=Causal(), absorbed=False)
        assert y.shape == (1, 128, 2, values) and len(hopper) == called


@pytest.mark.skipif(
    jax.__version_info__ < cudnn_attention._LEAST_JAX, reason="with such a JAX it is not used"
)
@pytest.mark.parametrize(
    ("system", "changes", "count"),
    [("standard", {}, 3), ("deepseek_v2", {"qk_nope_head_dim": 12}, 3), ("slam_v4", {}, 5)],
    ids=str,
)
def test_a_training_step_can_be_lowered_for_cuda(monkeypatch, system, changes, count):
    """As far as a machine without a GPU can go: JAX takes all shapes, of an odd number of tokens
    too, and there is a kernel for each attention, forward and backward."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91_300)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(kernels, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(cudnn_attention, "cuda_capability", lambda: 9.0)
    sizes = {"embed_dim": 64, "context_length": 256, **changes}
    config = make_config(system, "tiny", dtype="bfloat16", **sizes)
    graphdef, params = split_model(make_model(config, rngs=nnx.Rngs(0)))
    tokens = jnp.ones((2, 130), jnp.int32)

    def loss(params):
        return language_model_loss(merge_model(graphdef, params), tokens).total

    lowered = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__cudnn\$fmhaSoftmax(Backward)?\(", lowered)
    assert calls.count("") == calls.count("Backward") == count
