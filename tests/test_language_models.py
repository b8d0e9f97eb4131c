"""The nine systems and SLAM v3's text stream: what holds for all of them, and what is in each."""

import functools
import inspect
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slam_jax.errors import ConfigError, InputError
from slam_jax.generation import ModelAndTokenizer, Request, Sampling, generate, score, stream
from slam_jax.language_models import (
    ROCKET,
    SYSTEMS,
    Size,
    make_config,
    make_model,
    measure,
)
from slam_jax.language_models.__main__ import main as print_sizes
from slam_jax.layers.router import Routing
from slam_jax.protocol import LanguageModel
from slam_jax.training import OptimizerConfig, make_optimizer, make_train_step, split_model
from slam_jax.training.losses import language_model_loss, token_losses
from slam_jax.training.optimizer import decay_mask, muon_axes
from slam_jax.training.state import init_state

LENGTH, PROMPT = 21, 12
# Real tokens of each prompt; one of the prompts is as long as the array.
LENGTHS = np.array([[7, 1], [PROMPT, 9]])


@functools.cache
def build(name: str, **changes: Any) -> Any:
    """A tiny model whose parameters are none of them 0 or 1, so that each is seen."""
    config = make_config(name, "tiny", **changes)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(path: Any, p: Any) -> jax.Array:
        scale = any("scale" in str(key) for key in path)
        return jnp.asarray(scale + rng.normal(0, 0.2, p.shape), p.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, shapes))


def tokens(*rows: int, length: int = LENGTH) -> np.ndarray:
    """Random tokens, by default with two axes of rows."""
    return np.random.default_rng(0).integers(0, 61, (*(rows or (2, 2)), length), np.int32)


# Compiling takes nearly all of the time: the tests share these functions and the shapes of their
# arguments, so that each is compiled once for each configuration.


@jax.jit
def forward(model: Any, tokens: Any, mask: Any = None) -> Any:
    return model(tokens, mask)


@jax.jit
def prefill(model: Any, prompts: Any, lengths: Any = None) -> Any:
    return model.prefill(prompts, model.init_cache((2, 2), LENGTH), None, lengths=lengths)


@jax.jit
def step(model: Any, token: Any, cache: Any) -> Any:
    return model.decode_step(token, cache, None)


def close(x: Any, y: Any, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


each_system = pytest.mark.parametrize("name", SYSTEMS)


def some_systems(*fast: str, release: Collection[str] = ()) -> Any:
    """All systems: a few, those of a release, and the others with the slow tests only."""

    def marks(name: str) -> Any:
        return () if name in fast else pytest.mark.release if name in release else pytest.mark.slow

    return pytest.mark.parametrize("name", [pytest.param(x, marks=marks(x)) for x in SYSTEMS])


# One of each kind of cache, and of each mixture.
@some_systems(
    "jamba", "deepseek_v2", "slam_v6", release=("hunyuan_large", "hunyuan_v1_moe", "slam_v5")
)
def test_prompts_of_any_length_and_steps_after_them_are_the_whole_sequence(name):
    model, text = build(name), tokens()
    whole = np.asarray(forward(model, text).logits)
    prompts = np.where(np.arange(PROMPT) < LENGTHS[..., None], text[..., :PROMPT], 60)
    logits, cache = prefill(model, prompts, LENGTHS)
    for row, length in np.ndenumerate(LENGTHS):
        close(logits[row][:length], whole[row][:length])
    for i in range(LENGTH - PROMPT):
        place = (LENGTHS + i)[..., None]
        token = np.take_along_axis(text, place, axis=-1)[..., 0]
        logits, cache = step(model, token, cache)
        close(logits, np.take_along_axis(whole, place[..., None], axis=-2)[..., 0, :])


# Three texts, with a pad after the second and after the last.
SEGMENTS = np.repeat([1, 2, 0, 3, 0], [2, 7, 1, 10, 1])[None]


# Mamba, latent attention, shared keys and values, learned positions.
@some_systems("jamba", "deepseek_v2", "hunyuan_large", "slam_v5")
def test_texts_in_one_row_are_what_they_are_alone(name):
    model, row = build(name), tokens(1)
    if name == "slam_v3_text":
        with pytest.raises(InputError, match="segment_ids for slam_v3_text, .*; expected one text"):
            model(row, segment_ids=SEGMENTS)
        return
    packed = jax.jit(lambda model: model(row, segment_ids=SEGMENTS).logits[0])(model)
    alone, mask = np.zeros((3, LENGTH), np.int32), np.zeros((3, LENGTH), bool)
    for i in range(3):
        text = row[1 + i == SEGMENTS]
        alone[i, : len(text)], mask[i, : len(text)] = text, True
    for i, logits in enumerate(forward(model, alone, mask).logits):
        close(packed[SEGMENTS[0] == 1 + i], logits[mask[i]])


def test_no_token_is_predicted_from_another_text():
    model, row = build("standard"), tokens(1)

    @jax.jit
    def both(model):
        parts = language_model_loss(model, row, segment_ids=SEGMENTS)
        return model(row, segment_ids=SEGMENTS).logits[0], parts.cross_entropy

    logits, loss = both(model)
    each = token_losses(logits[:-1], row[0, 1:]).cross_entropy
    inside = (SEGMENTS[0, 1:] == SEGMENTS[0, :-1]) & (SEGMENTS[0, 1:] > 0)
    assert inside.sum() == 1 + 6 + 9
    close(loss, each[inside].mean())


def test_segments_beside_a_mask_or_of_another_shape_are_refused():
    model, row = build("standard"), tokens(1)
    with pytest.raises(InputError, match="segment_ids with a mask; expected them alone"):
        model(row, np.ones((1, LENGTH), bool), segment_ids=SEGMENTS)
    hidden = inspect.unwrap(type(model).hidden)  # without the check of types, which is for tests
    with pytest.raises(InputError, match=r"segment_ids of shape \(1, 5\); expected them alone"):
        hidden(model, row, segment_ids=SEGMENTS[:, :5])


@some_systems("standard", "slam_v3_text")
def test_a_prompt_without_lengths_fills_its_array(name):
    model, text = build(name), tokens(length=PROMPT)
    full = np.full((2, 2), PROMPT)
    jax.tree.map(close, prefill(model, text), prefill(model, text, full))


@some_systems("jamba", "deepseek_v2", "slam_v6", release=SYSTEMS)
def test_pads_on_either_side_change_nothing(name):
    model, text = build(name), tokens()
    padded = np.pad(text, [(0, 0), (0, 0), (5, 2)], constant_values=1)
    mask = np.zeros(padded.shape, bool)
    mask[..., 5 : 5 + LENGTH] = True
    # One row has a short text in it and longer pads.
    mask[1, 0, 5 + 9 :] = False
    plain, masked = forward(model, text), forward(model, padded, mask)
    close(masked.logits[:, 1, 5 : 5 + LENGTH], plain.logits[:, 1])
    close(masked.logits[1, 0, 5 : 5 + 9], plain.logits[1, 0, :9])
    if name not in ("jamba", "moe", "deepseek_v2", "hunyuan_large"):
        return
    # The load balance is that of the real tokens; in full rows it is that of the rows alone.
    mask[1, 0] = mask[0, 0]
    close(forward(model, padded, mask).aux_loss, plain.aux_loss)


@each_system
def test_no_token_looks_ahead(name):
    """Another token at place t changes the logits from t on, and none before."""
    model, text = build(name), tokens()
    plain = forward(model, text).logits
    for t in (0, 8, 13):
        other = text.copy()
        other[..., t] = (other[..., t] + 17) % 61
        change = np.abs(forward(model, other).logits - plain).max(axis=(0, 1, 3))
        sees = t + 8 if name == "slam_v3_text" else LENGTH  # at least its window and the next
        assert change[:t].max(initial=0.0) < 1e-5 and change[t:sees].min() > 1e-5


@pytest.mark.parametrize("name", ["slam_v5", pytest.param("jamba", marks=pytest.mark.slow)])
def test_no_gradient_comes_from_ahead(name):
    """The same by gradient, where each position has a table of its own."""
    t, model, text = 9, build(name), tokens(1, length=14)
    table = model.embedding.embedding[...]

    def logit(rows):
        graphdef, state = nnx.split(model)
        changed = nnx.merge(graphdef, state)
        changed.embedding.embedding = nnx.Param(rows.reshape(-1, rows.shape[-1]))
        places = np.arange(14, dtype=np.int32)[None] * len(table) + text
        return (changed(places).logits[0, t] ** 2).sum()

    gradient = jax.jit(jax.grad(logit))(jnp.stack([table] * 14))
    reached = np.abs(gradient).max(axis=(1, 2)) > 0
    assert reached.tolist() == (np.arange(14) <= t).tolist()


@some_systems("standard")
def test_it_learns(name):
    """A training step as every model of this project has it; the loss of one batch falls."""
    config = make_config(name, "tiny")
    model = jax.jit(lambda: make_model(config, rngs=nnx.Rngs(0)))()
    assert isinstance(model, LanguageModel) and isinstance(model, nnx.Module)
    graphdef, params = split_model(model)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=3e-3, warmup_steps=1, weight_decay=0.0), 20
    )

    def loss(model, batch, key):
        return language_model_loss(model, batch, key=key)

    train = jax.jit(make_train_step(graphdef, loss, optimizer))
    state = init_state(params, optimizer, jax.random.key(0), ema=False)
    losses = []
    for _ in range(8):
        state, metrics = train(state, tokens(2, length=17))
        losses.append(float(metrics.loss.cross_entropy))
    assert abs(losses[0] - np.log(61)) < 1.5 and losses[-1] < losses[0] - 0.4
    assert int(state.skipped) == 0
    before = params
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, before)
    still = [path for path, m in jax.tree_util.tree_flatten_with_path(moved)[0] if not m]
    assert not still, still


def test_training_adds_the_losses_of_the_experts():
    text, mask = tokens(2, length=9), np.arange(9) < np.array([[9], [5]])
    model = build("moe", num_layers=1)
    parts = jax.jit(language_model_loss)(model, text, mask)
    output = forward(model, text[:, :-1], mask[:, :-1])
    logits = np.asarray(output.logits, np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logits, text[:, 1:, None], -1)[..., 0]
    real = mask[:, 1:]
    close(parts.cross_entropy, -chosen[real].mean())
    close(parts.accuracy, (logits.argmax(-1) == text[:, 1:])[real].mean())
    assert output.aux_loss > 0.02
    close(parts.total, parts.cross_entropy + output.aux_loss)


@pytest.mark.parametrize(
    "changes", [{"device_balance_loss": 0.05}, {"communication_balance_loss": 0.02}]
)
def test_deepseeks_other_losses_add_to_it(changes):
    config = make_config("deepseek_v2", "tiny")
    scores = np.random.default_rng(0).normal(size=(4, LENGTH, config.num_experts))
    probs = jax.nn.softmax(jnp.float32(scores))
    weights, experts = jax.lax.top_k(probs, config.num_experts_per_token)
    routings = [Routing(weights, experts, probs)] * 2
    plain, more = (build("deepseek_v2", **c).balance(routings, None) for c in ({}, changes))
    # Two layers of experts; each term is 1 where loads are even, and more otherwise.
    assert more > plain + 2 * sum(changes.values()) * 0.9 > 0


@pytest.mark.parametrize("name", ["slam_v6", pytest.param("slam_v3_text", marks=pytest.mark.slow)])
def test_dropout_is_for_training_alone(name):
    model, text = build(name, dropout=0.5), tokens()
    train = jax.jit(lambda model, text, key: model(text, key=key).logits)
    plain = forward(model, text).logits
    close(plain, forward(build(name), text).logits)
    one, other = (train(model, text, jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(one - plain).max() > 0.1 and np.abs(one - other).max() > 0.1


@pytest.mark.parametrize(
    "name", [pytest.param("deepseek_v2", marks=pytest.mark.slow), "hunyuan_large"]
)
def test_capacity_is_for_training_alone(name):
    text = tokens()
    plain, bounded = (build(name, num_layers=2, **c) for c in ({}, {"capacity_factor": 0.5}))
    expected = forward(plain, text).logits
    close(expected, forward(bounded, text).logits)
    train = jax.jit(lambda model, text, key: model(text, key=key).logits)
    assert np.abs(train(bounded, text, jax.random.key(0)) - expected).max() > 1e-2


@pytest.mark.release
@some_systems("deepseek_v2")
def test_bfloat16_is_near_float32_and_its_cache_agrees(name):
    """As the published sizes are computed. What a system adds is that nothing overflows or dies."""
    model, text = build(name, dtype="bfloat16"), tokens()
    expected, found = forward(build(name), text).logits, forward(model, text).logits
    assert found.dtype == np.float32
    # Rounding may send a token to another expert; most are where they were.
    off = np.abs(found - expected).max(axis=-1) / np.abs(expected).max()
    assert np.median(off) < 0.06
    _, cache = prefill(model, text[..., :PROMPT], np.full((2, 2), PROMPT))
    off = []
    for t in range(PROMPT, LENGTH):
        logits, cache = step(model, text[..., t], cache)
        off.append(np.abs(logits - found[..., t, :]).max(axis=-1) / np.abs(found).max())
    assert np.median(off) < 0.06


def test_pads_beyond_the_last_position_are_no_matter():
    """A prompt of 20 tokens is padded to 32, and there are 24 positions."""
    changes = {"context_length": 24, "level_layers": 1}
    model, text = build("slam_v4", **changes), tokens(1, length=20)
    prompts, lengths = np.pad(text, [(0, 0), (0, 12)]), np.array([20])
    fill = jax.jit(lambda m, t, n: m.prefill(t, m.init_cache((1,), 34), None, lengths=n))
    close(fill(model, prompts, lengths)[0][:, :20], forward(model, text).logits)
    for name in ("slam_v4", "slam_v4_champion", "slam_v6"):
        model, text = build(name, **changes), tokens(1, length=25)
        embedded = model.embed(jnp.asarray(text), jnp.arange(15, 40)[None], None)
        assert np.isfinite(embedded).all()
        close(embedded[:, 8:], model.embed(jnp.asarray(text)[:, 8:], jnp.full((1, 17), 23), None))
        with pytest.raises(InputError, match="25 tokens; the context is 24"):
            model(text)
        with pytest.raises(InputError, match="25 tokens; the context is 24"):
            model.prefill(text, model.init_cache((1,), 25))


# --- Sizes


def test_slam_v6_has_its_published_size():
    assert measure(make_config("slam_v6")).total == 70_292_992


@pytest.mark.slow
def test_slam_v6_starts_at_its_published_loss():
    model = jax.jit(lambda: make_model(make_config("slam_v6"), rngs=nnx.Rngs(0)))()
    text = np.random.default_rng(0).integers(0, 10_000, (8, 129), np.int32)
    loss = jax.jit(language_model_loss)(model, text)
    assert abs(float(loss.cross_entropy) - 10.14) < 0.05


def measure_by_layers(name: str, preset: str) -> Size:
    """The size of a deep model, from two with few layers: each further period adds the same."""
    config = make_config(name, preset)
    first, period = {"jamba": (0, 8), "deepseek_v2": (1, 1), "hunyuan_large": (0, 2)}[name]
    repeats, rest = divmod(config.num_layers - first, period)
    assert rest == 0
    one, two = (
        np.array(measure(make_config(name, preset, num_layers=first + n * period))) for n in (1, 2)
    )
    return Size(*(one + (repeats - 1) * (two - one)).tolist())


@pytest.mark.release
@pytest.mark.parametrize(
    ("name", "preset", "total", "active"),
    [
        ("jamba", "mini_1.5", 51.6e9, 12e9),
        ("jamba", "large_1.5", 398e9, 94e9),
        ("deepseek_v2", "v2_lite", 15.7e9, 2.4e9),
        ("deepseek_v2", "v2", 236e9, 21e9),
        ("deepseek_v2", "v2.5", 236e9, 21e9),
        ("hunyuan_large", "large", 389e9, 52e9),
    ],
)
def test_published_models_have_their_published_size(name, preset, total, active):
    size = measure_by_layers(name, preset)
    assert abs(size.total / total - 1) < 0.01
    # Published with two digits; some count the embeddings and some do not.
    counts = (size.active, size.active - size.embedding)
    assert min(abs(count / active - 1) for count in counts) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset"),
    [("jamba", "large_1.5"), ("deepseek_v2", "v2"), ("hunyuan_large", "large")],
)
def test_deep_models_have_the_size_of_their_layers(name, preset):
    assert measure(make_config(name, preset)) == measure_by_layers(name, preset)


@pytest.mark.release
def test_sizes_count_what_there_is():
    for name in SYSTEMS:
        model, size = build(name), measure(make_config(name, "tiny"))
        total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
        assert size.total == total >= size.active > size.embedding > 0
    config = make_config("moe", "tiny")
    idle = config.num_layers * 3 * 32 * 48 * (config.num_experts - 2)
    size = measure(config)
    assert size.total - size.active == idle
    assert size.embedding == 2 * 61 * 32
    assert measure(make_config("slam_v4", "tiny")).embedding == 2 * 61 * 32 + 64 * 32


def test_the_latent_cache_holds_a_latent_and_a_rotary_key_a_token():
    assert measure_by_layers("deepseek_v2", "v2_lite").cache_bytes_per_token == 27 * (512 + 64) * 2
    tiny = make_config("deepseek_v2", "tiny")
    cache = build("deepseek_v2").init_cache((2,), 10)
    for layer in cache.blocks:
        assert {"c_kv": layer.c_kv.shape, "k_rope": layer.k_rope.shape} == {
            "c_kv": (2, 10, tiny.kv_lora_rank),
            "k_rope": (2, 10, tiny.qk_rope_head_dim),
        }


@pytest.mark.parametrize(("factor", "caches"), [(1, 3), (2, 2), (3, 1)])
def test_hunyuans_cache_holds_one_in_so_many_layers(factor, caches):
    config = make_config("hunyuan_large", "tiny", share_factor=factor)
    assert len(build("hunyuan_large", share_factor=factor).init_cache((1,), 8).blocks) == caches
    head_dim = config.embed_dim // config.num_heads
    expected = caches * 2 * config.num_kv_heads * head_dim * 4
    assert measure(config).cache_bytes_per_token == expected


def test_jambas_cache_grows_with_its_attention_layers_alone():
    config = make_config("jamba", "tiny")
    size = measure(config)
    assert size.cache_bytes_per_token == 2 * 2 * 8 * 4  # one layer of two heads of 8
    assert size.state_bytes == 3 * (3 * 64 + 64 * 4) * 4  # three of Mamba


def test_slam_v3_text_keeps_the_same_however_long_the_text():
    size = measure(make_config("slam_v3_text", "tiny"))
    assert size.cache_bytes_per_token == 0 and size.state_bytes > 0


def test_sizes_are_printed_as_a_table(capsys):
    from absl import flags

    flags.FLAGS(["test", "--preset=tiny"])
    print_sizes([])
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(SYSTEMS)
    size = measure(make_config("moe", "tiny"))
    assert f"| `moe` | tiny | {size.total:,} | {size.active:,} |" in "\n".join(table)
    flags.FLAGS(["test", "--preset=medium"])
    with pytest.raises(ValueError, match="--preset is 'medium'; expected published, large"):
        print_sizes([])
    flags.FLAGS(["test", "--preset=seed"])


# --- Structure


@pytest.mark.parametrize("name", ["slam_v4", "slam_v4_champion", "slam_v5", "slam_v6"])
def test_slam_models_have_two_layers_a_level_of_four_blocks_and_two_layers(name):
    blocks = build(name).blocks
    level = blocks[2]
    assert len(blocks) == 5
    assert [type(b).__name__ for b in blocks[:2]] == [type(b).__name__ for b in blocks[3:]]
    if name == "slam_v6":
        assert len(level.blocks) == 4
    else:
        leaves = jax.tree.leaves(nnx.state(level.stack))
        assert all(leaf.shape[0] == 4 for leaf in leaves)
        bias = next(p for path, p in flat(level.stack).items() if path[-1] == "query_bias")
        assert bias.shape[0] == 4 and len({float(b.sum()) for b in bias}) == 4


def flat(module: Any) -> dict[tuple, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(module)))
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", ["slam_v4", "slam_v4_champion", "slam_v5"])
def test_the_four_blocks_read_the_keys_and_values_of_level_one(name):
    """Their keys and values do not change when what the blocks themselves do changes."""
    model, text = build(name), tokens(length=PROMPT)
    caches = {}
    for change in (0.0, 1.0):
        graphdef, state = nnx.split(model)
        changed = jax.tree_util.tree_map_with_path(
            lambda path, p, by=change: p + by * any("stack" in str(k) for k in path), state
        )
        _, cache = prefill(nnx.merge(graphdef, changed), text, LENGTHS)
        caches[change] = cache.blocks
    for before, after in zip(caches[0.0][:3], caches[1.0][:3], strict=True):
        jax.tree.map(close, before, after)
    above = zip(jax.tree.leaves(caches[0.0][3]), jax.tree.leaves(caches[1.0][3]), strict=True)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in above)


def test_the_champion_runs_its_blocks_twice():
    text = tokens()
    once, twice = (build("slam_v4_champion", num_cycles=n) for n in (1, 2))
    same = [leaf.shape for leaf in jax.tree.leaves(nnx.state(once))]
    assert same == [leaf.shape for leaf in jax.tree.leaves(nnx.state(twice))]
    assert np.abs(forward(once, text).logits - forward(twice, text).logits).max() > 1e-2


def test_slam_v3_text_sees_its_window_and_the_one_before():
    """With windows of 8, token 19 is in the third: it sees tokens 8 to 19."""
    model, text = build("slam_v3_text"), tokens()
    logits = forward(model, text).logits[..., 19, :]
    seen = []
    for t in range(20):
        other = text.copy()
        other[..., t] = (other[..., t] + 1) % 61
        seen.append(bool(np.abs(forward(model, other).logits[..., 19, :] - logits).max() > 1e-4))
    assert seen == [t >= 8 for t in range(20)]


def test_jambas_layers_are_where_the_paper_has_them():
    config = make_config("jamba", "mini_1.5")
    layers = range(config.num_layers)
    assert [i for i in layers if config.has_attention(i)] == [4, 12, 20, 28]
    assert [i for i in layers if config.has_experts(i)] == list(range(1, 32, 2))


def test_every_kernel_decays_and_nothing_else_does():
    """In Mamba neither A nor D may; Muon takes the matrices of experts one by one."""
    decays = flat_dict(decay_mask(split_model(build("jamba"))[1]))
    kept = {path[-1] for path, on in decays.items() if not on}
    assert kept == {"a_log", "skip", "conv_filter", "conv_bias", "bias", "scale", "embedding"}
    axes = flat_dict(muon_axes(split_model(build("moe"))[1]), lambda x: hasattr(x, "output_axis"))
    gate = axes["blocks", 0, "mlp", "experts", "gate", "kernel"]
    assert gate.reduction_axis == (1,) and gate.output_axis == (2,)


def flat_dict(tree: Any, is_leaf: Any = None) -> dict[tuple, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def test_published_sizes_have_the_published_settings():
    v2, v25, lite = (make_config("deepseek_v2", preset) for preset in ("v2", "v2.5", "v2_lite"))
    assert (v2.routed_scale, v2.num_groups, v2.top_groups) == (16.0, 8, 3)
    assert (v2.num_experts, v2.num_experts_per_token, v2.num_shared_experts) == (160, 6, 2)
    assert (lite.routed_scale, lite.num_groups, lite.num_experts_per_token) == (1.0, 1, 6)
    assert not v2.renormalize and v2.init_std == 0.006
    # The paper's scales of the scores, as the facts of its files have them.
    assert v2.rope.score_scale == lite.rope.score_scale == pytest.approx(1.59, abs=0.005)
    assert v25.rope.score_scale == pytest.approx(1.87, abs=0.005)
    assert {rope.magnitude for rope in (v2.rope, v25.rope, lite.rope)} == {1.0}
    large = make_config("hunyuan_large", "large")
    assert (large.rope.ntk_alpha, large.norm_epsilon, large.share_factor) == (1e5, 1e-5, 2)
    assert (large.num_experts, large.num_experts_per_token, large.tie_embeddings) == (16, 1, True)
    mini = make_config("jamba", "mini_1.5")
    assert (mini.num_experts, mini.num_experts_per_token, mini.balance_loss) == (16, 2, 0.001)


# --- Registry


def test_the_registry_has_the_nine_systems_and_builds_each():
    assert len(ROCKET) == 9 and set(ROCKET) < set(SYSTEMS)
    for name, system in SYSTEMS.items():
        model = build(name)
        assert type(model) is system.model
        assert {"tiny"} <= set(system.presets)
        if name in (*ROCKET, "slam_v3_text"):
            seed = make_config(name, "seed")
            assert (seed.vocab_size, seed.embed_dim, seed.num_heads) == (10_000, 512, 16)
            assert seed.mlp_dim == 2_048


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (("jamab",), {}, "no field 'jamab'; did you mean 'jamba'"),
        (("moe", "large"), {}, "preset is 'large'; moe has seed, small, tiny"),
        (("moe",), {"num_expert": 3}, "MoEConfig has no field 'num_expert'; did you mean"),
        (("moe",), {"num_experts": 1}, "num_experts_per_token is 2; expected 1 to num_experts=1"),
        (("standard",), {"num_kv_heads": 3}, "num_kv_heads is 3; expected a divisor of num_heads"),
        (("standard",), {"num_kv_heads": 0}, "num_kv_heads is 0; expected at least 1"),
        (("standard",), {"head_dim": -4}, "head_dim is -4; expected at least 1"),
        (
            ("standard",),
            {"head_dim": 5},
            "head_dim is 5; expected such that a head's width is even",
        ),
        (("deepseek_v2",), {"capacity_factor": -1.0}, "capacity_factor is -1.0; expected None, or"),
        (("standard",), {"dtype": "int8"}, "dtype is 'int8'; expected one of"),
        (("standard",), {"embed_dim": 500}, "embed_dim is 500; expected a multiple of num_heads"),
        (("standard",), {"norm_epsilon": 0.0}, "norm_epsilon is 0.0; expected a number above 0"),
        (("jamba",), {"attention_offset": 8}, "attention_offset is 8; expected 0 to attention_per"),
        (("deepseek_v2",), {"num_groups": 3}, "num_groups is 3; expected a divisor of num_experts"),
        (("deepseek_v2",), {"top_groups": 5}, "top_groups is 5; expected 1 to num_groups=4"),
        (("deepseek_v2",), {"num_experts_per_token": 5}, "is 5; expected at most 4, as many as"),
        (("deepseek_v2",), {"qk_rope_head_dim": 3}, "qk_rope_head_dim is 3; expected an even"),
        (("slam_v6",), {"num_heads": 1}, "num_heads is 1; expected an even number"),
        (("slam_v6",), {"dropout": 1.0}, "dropout is 1.0; expected a rate in"),
        (("slam_v3_text",), {"text_window": 0}, "text_window is 0; expected at least 1"),
        (("slam_v3_text",), {"tie_embeddings": True}, "tie_embeddings is True; expected False"),
        (("slam_v3_text",), {"norm_epsilon": 1e-5}, "norm_epsilon is 1e-05; expected 1e-06"),
        (("deepseek_v2",), {"q_lora_rank": 0}, "q_lora_rank is 0; expected at least 1"),
        (("jamba",), {"dt_rank": 0}, "dt_rank is 0; expected at least 1"),
    ],
)
def test_what_cannot_be_built_is_named(arguments, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_config(*arguments, **changes)
    assert "\n" not in str(error.value)


# --- Generation


WORDS = ["shape of red", "left half: blue", "circle", "yes", "größer als 日本", "red green blue"]


@functools.cache
def speaker(name: str) -> ModelAndTokenizer:
    from slam_jax.data import Tokenizer

    tokenizer = Tokenizer.train(WORDS * 9, 300)
    changes = {"vocab_size": tokenizer.vocab_size}
    return ModelAndTokenizer(build(name, **changes), tokenizer)


@pytest.mark.release
@some_systems("deepseek_v2")
def test_requests_are_answered_alike_alone_in_a_batch_and_in_pieces(name):
    loaded = speaker(name)
    sampling = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95, num_samples=2)
    requests = [Request(prompt, seed=i) for i, prompt in enumerate((WORDS[0], "", WORDS[4]))]
    together = generate(loaded, requests, sampling)
    for request, answer in zip(requests[:2], together, strict=False):
        [alone] = generate(loaded, [request], sampling)
        assert [s.tokens for s in alone.samples] == [s.tokens for s in answer.samples]
        for a, b in zip(alone.samples, answer.samples, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4, rtol=1e-4)
    assert "".join(stream(loaded, requests[0], sampling)) == together[0].text
    assert len({answer.text for answer in together}) == 3
    scores = score(loaded, requests[0], ["circle", "yes"])
    expected = generate(loaded, [requests[0]], Sampling(max_new_tokens=1))[0].samples[0].logprob
    assert max(s.logprob for s in scores) <= expected + 1e-5


def test_a_language_model_reads_prompts_alone():
    with pytest.raises(ValueError, match="this model reads prompts alone"):
        generate(speaker("standard"), [Request("red", text="a circle")])
