"""Where the kernels of attention are chosen, and that they give what plain attention does."""

import contextlib
import functools
import math
import re
import sys
import types
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from slam_jax.data import Batch
from slam_jax.errors import InputError
from slam_jax.kernels import backend, fused_attention
from slam_jax.kernels.backend import cuda_capability, for_accelerators
from slam_jax.kernels.fused_attention import fused_attend, kernel_of
from slam_jax.language_models.registry import SYSTEMS, make_config, make_model
from slam_jax.layers import MultiHeadLatentAttention, attend, latent_attend
from slam_jax.layers.masks import Causal, as_array
from slam_jax.layers.rotary import Rope, Yarn
from slam_jax.planning.compiled import dependent
from slam_jax.planning.subjects import LanguageRun
from slam_jax.slam_v3 import Inputs, SlamV3, SlamV3Config
from slam_jax.training import (
    LossConfig,
    language_model_loss,
    make_optimizer,
    make_train_step,
    merge_model,
    split_model,
)
from slam_jax.training.losses import num_answer_tokens, slam_v3_loss
from slam_jax.training.optimizer import OptimizerConfig
from slam_jax.training.start import abstract_state, jit_train_step

pytestmark = pytest.mark.release

LENGTH, WIDTH = 9, 8


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(params=["xla", "xla_chunked"])
def kernel(request, monkeypatch) -> str:
    """A kernel that a CPU has, of each library, taken for any number of tokens."""
    if request.param == "xla_chunked":
        pytest.importorskip("tokamax")
    monkeypatch.setattr(fused_attention, "_LEAST_PAIRS", 0)
    return request.param


def pulled(f, *given):
    """The values of f, and its gradients for something that weights them unevenly."""
    y, pull = jax.vjp(f, *given)
    return (y, *pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)))


def close(one: Any, other: Any, tolerance: float = 2e-5) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), atol=tolerance
        )


def some(*shape: int) -> jax.Array:
    """A mask with a third of its places True; its last query has no key."""
    return jax.random.bernoulli(jax.random.key(4), 1 / 3, shape).at[..., -1, :].set(False)


# Name -> leading axes, heads of queries and keys, features of values, keys, mask, dtype.
CASES: dict[str, tuple[Any, ...]] = {
    "no mask": ((2,), (4, 4), WIDTH, 7, None, "float32"),
    "no rows": ((), (4, 2), 5, 7, None, "float32"),
    "pads; nothing but pads": (
        (2, 3),
        (4, 1),
        11,
        7,
        jnp.asarray(np.arange(7) < np.array([5, 0])[:, None, None, None]),
        "float32",
    ),
    "a mask a row": ((2,), (4, 2), WIDTH, 7, some(2, LENGTH, 7), "float32"),
    "a mask for all rows": ((2, 3), (4, 2), WIDTH, 8, some(LENGTH, 8), "float32"),
    "causal": ((2,), (4, 2), 5, LENGTH, Causal(), "float32"),
    "a window": ((2, 3), (4, 4), 11, LENGTH, Causal(3), "float32"),
    "itself alone": ((), (4, 1), WIDTH, LENGTH, Causal(1), "float32"),
    "bfloat16": ((2,), (4, 2), 5, 7, some(2, LENGTH, 7), "bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_what_plain_attention_does(kernel, name):
    """Values and gradients; zeros, and no gradient, for a query without keys."""
    lead, (many, few), values, keys, mask, dtype = CASES[name]
    shapes = ((LENGTH, many, WIDTH), (keys, few, WIDTH), (keys, few, values))
    q, k, v = (normal(i, *lead, *shape).astype(dtype) for i, shape in enumerate(shapes))
    found = pulled(lambda q, k, v: fused_attend(q, k, v, mask, kernel), q, k, v)
    close(
        found,
        pulled(lambda q, k, v: attend(q, k, v, mask), q, k, v),
        0.03 if v.itemsize < 4 else 2e-5,
    )
    if name == "a mask a row":
        assert not found[0][:, -1].any() and not found[1][:, -1].any()
    if name == "pads; nothing but pads":
        assert not any(x[1].any() for x in found)


def test_processes_read_one_bank(kernel):
    """Queries and masks differ from process to process; keys and values do not."""
    q, k, v = normal(1, 3, 2, LENGTH, 4, WIDTH), normal(2, 2, 7, 2, WIDTH), normal(3, 2, 7, 2, 5)
    mask = some(3, LENGTH, 7)[:, None]

    def of_all(read):
        def run(q, k, v):
            each = jax.vmap(lambda q, mask: read(q, k, v, mask), spmd_axis_name="process")
            return each(q, mask)

        return pulled(run, q, k, v)

    close(of_all(functools.partial(fused_attend, kernel=kernel)), of_all(attend))


def test_tpus_get_whole_blocks(monkeypatch):
    """Tokens are added up to a multiple of 128. A mask has a row for each query, with some key,
    for else a kernel may divide by zero."""
    shapes = []

    def library(q, k, v, *, mask=None, local_window_size=None, **named):
        shapes.append((q.shape[1], k.shape[1], None if mask is None else mask.shape))
        assert local_window_size is None and (mask is None or mask.any(axis=-1).all())
        return jax.nn.dot_product_attention(q, k, v, mask=mask, **named)

    q, k = normal(1, 2, LENGTH, 4, WIDTH), normal(2, 2, 130, 2, WIDTH)
    pads = jnp.asarray(np.arange(130) < np.array([130, 0])[:, None, None])
    cases = (
        (None, k, (128, 256, (1, 1, 128, 256))),
        (pads, k, (128, 256, (2, 1, 128, 256))),
        (Causal(), k[:, :LENGTH], (128, 128, None)),
        (Causal(3), k[:, :LENGTH], (128, 128, (1, 1, 128, 128))),
    )
    monkeypatch.setattr(fused_attention, "_library", lambda kernel: library)
    for mask, k, shape in cases:
        expected = pulled(lambda q, k, v, mask=mask: attend(q, k, v, mask), q, k, k)
        with monkeypatch.context() as tpu:
            tpu.setattr(jax, "default_backend", lambda: "tpu")
            found = pulled(
                lambda q, k, v, mask=mask: fused_attend(q, k, v, mask, "tokamax"), q, k, k
            )
        close(found, expected)
        assert shapes.pop() == shape and not shapes


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


# What is changed of queries on a Hopper GPU -> the kernel with tokamax, and without it.
CHOICES: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "as they are": ({}, "tokamax", "cudnn"),
    "a CPU": ({"backend": "cpu"}, None, None),
    "a TPU": ({"backend": "tpu", "capability": 0.0}, "tokamax", None),
    "no rows": ({"rows": 0}, None, None),
    "few pairs": ({"keys": 127}, None, None),
    "few queries and many keys": ({"tokens": 64, "keys": 256, "mask": None}, "tokamax", "cudnn"),
    "a decoding step": ({"tokens": 1, "keys": 1 << 15, "mask": None}, None, None),
    "an array": ({"mask": jnp.ones((1, 128), bool)}, "tokamax", None),
    "no mask": ({"mask": None}, "tokamax", "cudnn"),
    "no mask and an odd number": ({"mask": None, "keys": 129}, "tokamax", None),
    "float16": ({"dtype": jnp.float16}, "tokamax", "cudnn"),
    "float32": ({"dtype": jnp.float32}, "tokamax", None),
    "a width of no 8": ({"width": 60}, "tokamax", None),
    "a wide head": ({"width": 256}, "tokamax", "cudnn"),
    "a wider one": ({"width": 264}, "tokamax", None),
    "a wide head on Ampere": ({"width": 136, "capability": 8.0}, "tokamax", None),
    "Ampere": ({"capability": 8.0}, "tokamax", "cudnn"),
    "Turing": ({"capability": 7.5}, "tokamax", None),
    "Blackwell": ({"capability": 10.0}, "tokamax", "cudnn"),
    "a wide head on Blackwell": ({"width": 136, "capability": 12.0}, "tokamax", None),
    "a JAX with a fault": ({"jax": (0, 11, 0)}, "tokamax", None),
}


@pytest.mark.parametrize("installed", [True, False], ids=["tokamax", "no tokamax"])
@pytest.mark.parametrize("name", CHOICES)
def test_a_kernel_is_chosen_where_it_fits(monkeypatch, name, installed):
    changes, *expected = CHOICES[name]
    has = {"tokens": 128, "keys": 128, "width": 64, "dtype": jnp.bfloat16, "capability": 9.0}
    has |= {"jax": (0, 11, 1), "rows": 2, "backend": "gpu", "mask": Causal()} | changes
    q = jnp.zeros((has["rows"], has["tokens"], 4, 64), has["dtype"])
    monkeypatch.setattr(fused_attention, "cuda_capability", lambda: has["capability"])
    monkeypatch.setattr(fused_attention, "has_tokamax", lambda: installed)
    monkeypatch.setattr(jax, "default_backend", lambda: has["backend"])
    monkeypatch.setattr(jax, "__version_info__", has["jax"])
    found = kernel_of(q, has["keys"], has["width"], has["mask"])
    assert found == expected[0 if installed else 1]


@pytest.mark.parametrize(
    ("device", "capability", "first"),
    [
        ("tpu", 0.0, "mosaic"),
        ("gpu", 9.0, "mosaic"),
        ("gpu", 8.0, "triton"),
        ("gpu", 0.0, "triton"),
    ],
    ids=str,
)
def test_the_first_kernel_of_tokamax_has_a_gradient(monkeypatch, device, capability, first):
    """And the last never stores the scores."""
    named: dict[str, Any] = {}
    module = types.SimpleNamespace(dot_product_attention=lambda **given: named.update(given))
    monkeypatch.setitem(sys.modules, "tokamax", module)
    monkeypatch.setattr(fused_attention, "cuda_capability", lambda: capability)
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    fused_attention._library("tokamax")()
    kernels = named["implementation"]
    assert kernels[0] == first and kernels[-1] == "xla_chunked"


def test_a_request_ends_with_its_context():
    with for_accelerators("xla"), for_accelerators():
        assert backend.requested_attention() is None and not backend.on_cpu()
    assert backend.requested_attention() is None and backend.on_cpu()


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


@pytest.fixture
def calls(monkeypatch) -> list[Any]:
    """The masks of all calls of the fused attention."""
    found: list[Any] = []

    def called(q, k, v, mask, kernel, **named):
        found.append(mask)
        return fused_attend(q, k, v, mask, kernel, **named)

    monkeypatch.setattr(fused_attention, "fused_attend", called)
    return found


QUICK = ("standard", "deepseek_v2", "slam_v4")


@pytest.mark.parametrize(
    "system",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SYSTEMS],
)
def test_a_language_model_is_the_same_with_it(kernel, calls, system):
    """Also for rows with pads, for which there is no mask in words."""
    config = make_config(system, "tiny")
    model = make_model(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, config.vocab_size)
    real = np.arange(LENGTH) < np.array([[LENGTH], [4]])

    def both():
        run = jax.jit(lambda model, mask: model(tokens, mask).logits)
        return run(model, None), run(model, jnp.asarray(real))[real]

    expected = both()
    assert not calls
    with for_accelerators(kernel):
        close(both(), expected, 5e-5)
    assert any(isinstance(mask, Causal) for mask in calls)
    assert any(isinstance(mask, jax.Array) for mask in calls)


@pytest.mark.parametrize("window", [None, 3])
def test_latent_attention_is_the_same_with_it(kernel, calls, window):
    """Its scores have a scale of their own."""
    rope = Rope(yarn=Yarn(40.0, 4_096, mscale=0.7, mscale_all_dim=0.7))
    sizes: Any = dict(kv_lora_rank=12, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5)
    layer = MultiHeadLatentAttention(16, 4, **sizes, rope=rope, window=window, rngs=nnx.Rngs(0))
    x = normal(1, 2, LENGTH, 16)
    expected = layer(x)
    assert rope.score_scale != 1.0 and not calls
    with for_accelerators(kernel):
        close(layer(x), expected)
    assert calls == [Causal(window)]


def v3_batch(batch: int, *, text: int, size: int, aux: int, width: int, length: int) -> Batch:
    """A batch in which some rows lack some of the streams."""
    rng = np.random.default_rng(0)
    inputs = Inputs(
        text=rng.integers(0, 13, (batch, text), np.int32),
        text_mask=np.arange(text) < rng.integers(0, text, (batch, 1)),
        image=rng.integers(0, 256, (batch, size, size, 3), np.uint8),
        image_mask=np.arange(batch) > 0,
        aux=rng.normal(size=(batch, aux, width)).astype(np.float32),
        aux_mask=np.zeros((batch, aux), bool),
    )
    ones = np.ones((batch, 1), np.int32)
    tokens = rng.integers(0, 13, (batch, 1, length + 1), np.int32)
    return Batch(inputs, tokens, 3 * ones, (length - 1) * ones)


def test_slam_v3_is_the_same_with_it(kernel, calls, build):
    """Absent streams, and gradients."""
    model = build(num_memory_tokens=4, num_decoder_layers=1)
    graphdef, params = split_model(model)
    batch = v3_batch(2, text=6, size=12, aux=3, width=5, length=LENGTH)

    def loss(params):
        return slam_v3_loss(merge_model(graphdef, params), batch, LossConfig()).total

    def gradients():
        return jax.jit(lambda params: jax.value_and_grad(loss)(params))(params)

    expected = gradients()
    assert not calls
    with for_accelerators(kernel):
        close(gradients(), expected, 1e-4)
    assert len(calls) > 8


@pytest.mark.skipif(
    jax.__version_info__ < fused_attention._LEAST_JAX, reason="with such a JAX it is not used"
)
@pytest.mark.parametrize(
    ("system", "changes", "count"),
    [("standard", {}, 3), ("deepseek_v2", {"qk_nope_head_dim": 12}, 3), ("slam_v4", {}, 5)],
    ids=str,
)
def test_a_training_step_can_be_lowered_for_cudnn(monkeypatch, system, changes, count):
    """As far as a machine without a GPU can go: JAX takes all shapes, of an odd number of tokens
    too, and there is a kernel for each attention, forward and backward."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91_300)
    monkeypatch.setattr(kernels, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(kernels, "is_cuda_compute_capability_equal", lambda capability: False)
    sizes = {"embed_dim": 64, "context_length": 256, **changes}
    config = make_config(system, "tiny", dtype="bfloat16", **sizes)
    graphdef, params = split_model(make_model(config, rngs=nnx.Rngs(0)))
    tokens = jnp.ones((2, 130), jnp.int32)

    def loss(params):
        return language_model_loss(merge_model(graphdef, params), tokens).total

    with for_accelerators("cudnn"):
        traced = jax.jit(jax.grad(loss)).trace(params)
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__cudnn\$fmhaSoftmax(Backward)?\(", lowered)
    assert calls.count("") == calls.count("Backward") == count


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("mask", [None, "pads", "any", Causal(), Causal(3)], ids=str)
def test_the_kernels_of_tokamax_take_our_shapes(monkeypatch, mask, platform):
    """Forward and backward, for latent attention's widths and any number of tokens, as far as a
    machine without such a device can go. Others would raise, and no other kernel is tried then."""
    tokamax = pytest.importorskip("tokamax")
    hopper = dict(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
    hopper = types.SimpleNamespace(**hopper, core_count=132)
    kernel, call = ("mosaic_tpu", "tpu_custom_call") if platform == "tpu" else ("mosaic_gpu",) * 2
    q, v = jnp.zeros((2, 140, 4, 24), jnp.bfloat16), jnp.zeros((2, 131, 2, 16), jnp.bfloat16)
    if isinstance(mask, Causal):
        v = jnp.zeros((2, 140, 2, 16), jnp.bfloat16)
    mask = {"pads": jnp.ones((2, 1, 131), bool), "any": some(2, 140, 131)}.get(str(mask), mask)

    def both(q, k, v):
        return pulled(lambda q, k, v: fused_attend(q, k, v, mask, kernel), q, k, v)

    if platform == "tpu":
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    else:
        monkeypatch.setattr(jax.extend.backend, "get_default_device", lambda: hopper)
    # Its masks are broadcast along new axes.
    with tokamax.config.cross_compile(True), jax.numpy_rank_promotion("allow"):
        traced = jax.jit(both).trace(q, q[:, : v.shape[1], :2], v)
        lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert lowered.count(f"custom_call @{call}") >= 2


def language_step(system: str) -> tuple[Any, ...]:
    subject = LanguageRun(system, "tiny", batch_size=2, num_tokens=LENGTH).subject()
    graphdef, state = subject.state
    return subject.step(graphdef, state), state, subject.batch


def v3_step(config: SlamV3Config, batch: Batch) -> tuple[Any, ...]:
    optimizer = OptimizerConfig()
    graphdef, state = abstract_state(functools.partial(SlamV3, config), optimizer, 10)
    loss = functools.partial(slam_v3_loss, config=LossConfig())
    return jit_train_step(graphdef, state, loss, optimizer, 10, num_answer_tokens), state, batch


def next_token(model: Any, tokens: Any, *memory: Any) -> Any:
    """One more token after a prompt."""
    cache = model.init_cache(tokens.shape[:-1], LENGTH + 1)
    cache = model.prefill(tokens, cache, *memory)[1]
    return model.decode_step(tokens[..., 0], cache, *memory)[0]


@pytest.mark.parametrize("system", ["slam_v3", "deepseek_v2", "jamba"])
def test_steps_can_be_exported_for_cuda_and_tpu(kernel, system):
    """A training step, and a prefill with a decoding step."""
    disabled = ()
    if kernel == "xla_chunked":
        disabled = pytest.importorskip("tokamax").DISABLE_JAX_EXPORT_CHECKS
    tokens = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)
    if system == "slam_v3":
        config: Any = SlamV3Config.preset("tiny", 13, num_decoder_layers=1)
        batch = v3_batch(2, text=6, size=24, aux=3, width=5, length=LENGTH)
        step, *given = v3_step(config, batch)
        model = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
        generate, also = (lambda m, t, i: next_token(m, t, m.encode(i))), (batch.inputs,)
    else:
        step, *given = language_step(system)
        config = make_config(system, "tiny")
        model = nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0)))
        generate, also = next_token, ()
    export = functools.partial(
        jax.export.export, platforms=["cuda", "tpu"], disabled_checks=disabled
    )
    with for_accelerators(kernel):
        for f, arguments in ((jax.jit(step), given), (jax.jit(generate), (model, tokens, *also))):
            assert export(f)(*arguments).platforms == ("cuda", "tpu")


def test_no_scores_are_kept_for_the_backward_pass():
    """A step of SLAM v3 at the widths of `base`, with one layer of each kind, stores none."""
    pytest.importorskip("tokamax")
    layers: Any = dict(
        num_process_layers=1, num_decoder_layers=1, remat=None, num_memory_tokens=120
    )
    config = SlamV3Config.preset(
        "base", 13, **layers, image=dict(encoder="vit", size=224, patch_size=16, num_layers=1)
    )
    batch = v3_batch(2, text=40, size=224, aux=16, width=64, length=160)
    model = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
    graphdef, params = split_model(model)
    tokens = {196, 252, 120, 160}  # of an image, all streams, the memory and an answer

    def kept(params, key):
        def loss(params):
            return slam_v3_loss(merge_model(graphdef, params), batch, LossConfig(), key=key).total

        return jax.tree.leaves(jax.vjp(loss, params)[1])

    def scores(context):
        with context:  # a new function, since JAX remembers what it has traced
            found = jax.eval_shape(lambda *given: kept(*given), params, jax.random.key(0))
        shapes = {x.shape for x in found if jnp.issubdtype(x.dtype, jnp.floating)}
        return {shape for shape in shapes if len(shape) > 2 and {*shape[-2:]} <= tokens}

    assert len(scores(contextlib.nullcontext())) > 3
    assert not scores(for_accelerators("xla_chunked"))


def test_a_new_model_computes_in_the_dtype_of_its_device():
    """A stored configuration without the field means float32 everywhere."""
    config = SlamV3Config.preset("tiny", 13)
    assert config.dtype is None and config.dtypes["dtype"] == jnp.float32
    with for_accelerators():
        assert config.dtypes == {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
        assert SlamV3Config(13).dtypes["dtype"] == jnp.float32


def batch_of_base(num_tokens: int) -> Batch:
    """Shapes of 16 examples with an image of 196 tokens and a text of so many."""
    shape: Any = jax.ShapeDtypeStruct
    text, mask = shape((16, num_tokens), jnp.int32), shape((16, num_tokens), jnp.bool_)
    inputs = Inputs(text=text, text_mask=mask, image=shape((16, 224, 224, 3), jnp.uint8))
    length = shape((16, 1), jnp.int32)
    return Batch(inputs, shape((16, 1, 32), jnp.int32), length, length)


def test_base_keeps_at_most_eight_gib_for_its_backward_pass():
    """16 examples of 512 tokens of text and 196 of an image; weights and casts not counted."""
    pytest.importorskip("tokamax")
    given = batch_of_base(512), jax.random.key(0)

    def kept(params, batch, key):
        def loss(params):
            return slam_v3_loss(merge_model(graphdef, params), batch, LossConfig(), key=key).total

        return jax.tree.leaves(jax.vjp(loss, params)[1])

    with for_accelerators("xla_chunked"):
        config = SlamV3Config.preset("base", 32_000)
        graphdef, params = split_model(nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0))))
        jaxpr = jax.make_jaxpr(kept)(params, *given).jaxpr
    found = dependent(jaxpr.invars[len(jax.tree.leaves(params)) :], jaxpr)
    arrays: list[Any] = [var.aval for var in {*found} if var is not None]
    assert all(x.shape[-2:].count(708) < 2 for x in arrays)
    num_bytes = [math.prod(x.shape) * x.dtype.itemsize for x in arrays if x.dtype != given[1].dtype]
    assert sum(num_bytes) < 8 * 2**30


def test_no_value_of_base_exceeds_two_gib_on_long_texts():
    """16 examples of 4,096 tokens of text and 196 of an image, in four parts."""
    pytest.importorskip("tokamax")
    optimizer = OptimizerConfig(accumulate_steps=4)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            for var in equation.outvars:
                if not jnp.issubdtype(var.aval.dtype, jax.dtypes.prng_key):
                    yield math.prod(var.aval.shape) * var.aval.dtype.itemsize
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    with for_accelerators("xla_chunked"):
        config = SlamV3Config.preset("base", 32_000, context_length=4_096)
        make_model = functools.partial(SlamV3, config)
        graphdef, state = abstract_state(make_model, optimizer, 10)
        loss = functools.partial(slam_v3_loss, config=LossConfig())
        arguments = graphdef, loss, make_optimizer(optimizer, 10)
        step = make_train_step(*arguments, accumulate_steps=4, weight_of=num_answer_tokens)
        jaxpr = jax.make_jaxpr(step)(state, batch_of_base(4_096)).jaxpr
    assert 2**30 < max(sizes(jaxpr)) < 2 * 2**30
