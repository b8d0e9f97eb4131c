"""SLAM v3 whole: what may change its answers, and what must not."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import compiled

from slam_jax.errors import ConfigError
from slam_jax.layers import attend
from slam_jax.slam_v3 import ImageConfig, Inputs, SlamV3, SlamV3Config
from slam_jax.slam_v3.config import PRESETS

VOCAB, LENGTH = 13, 7
STREAMS = ("text", "image", "aux")
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, 3, LENGTH), np.int32)

encode = jax.jit(SlamV3.encode)
decode = jax.jit(SlamV3.decode)
prefill = jax.jit(SlamV3.prefill)
decode_step = jax.jit(SlamV3.decode_step)


@jax.jit
def forward(model, tokens, inputs, key=None):
    return model(tokens, inputs, key=key).logits


@jax.jit
def logits_and_gradients(model, tokens, inputs):
    """The gradients, by parameter, are those of a loss in which every logit counts."""

    def loss(model):
        logits = model(tokens, inputs).logits
        return jnp.sum(logits**2), logits

    gradients, logits = jax.grad(loss, has_aux=True)(model)
    return logits, nnx.state(gradients)


@jax.jit
def run_parts(model, inputs):
    """Streams after the joint block, the bank, the outputs of the processes."""
    embeddings = None if inputs.text is None else model.embedding(inputs.text)
    streams, bank = model.level_one(model.streams(inputs, embeddings))
    return streams, bank, model.processes(streams, bank)[0]


def split(x, streams):
    """The tokens [.., S, D] of all streams by stream."""
    ends = np.cumsum([stream.tokens.shape[1] for stream in streams])
    return jnp.split(x, ends[:-1], axis=-2)


def close(x, y, tolerance=1e-5):
    np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def without(inputs, *names):
    return dataclasses.replace(inputs, **{n + s: None for n in names for s in ("", "_mask")})


def masked(inputs, rows, *names):
    """The inputs with these streams absent in these rows."""
    masks = {f"{name}_mask": getattr(inputs, f"{name}_mask").copy() for name in names}
    for mask in masks.values():
        mask[rows] = False
    return dataclasses.replace(inputs, **masks)


@pytest.fixture(scope="module")
def model(build):
    return build()


@pytest.fixture(scope="module")
def inputs(make_inputs):
    return make_inputs()


@pytest.fixture(scope="module")
def parts(model, inputs):
    return run_parts(model, masked(inputs, 1, "image"))


# --- Decoding


@pytest.mark.parametrize("prompts", [(), (3,)], ids=["one prompt", "three prompts"])
def test_prefill_and_steps_give_the_logits_of_decode_at_every_position(model, inputs, prompts):
    tokens = TOKENS if prompts else TOKENS[:, 0]
    memory = encode(model, inputs)
    full = decode(model, tokens, memory)
    lengths = jnp.array([[4, 1, 3], [2, 4, 4]] if prompts else [4, 1])
    cache = model.init_cache((2, *prompts), LENGTH)
    logits, cache = prefill(model, tokens[..., :4], cache, memory, lengths=lengths)
    close(logits, full[..., :4, :])
    for step in range(LENGTH - 1):
        at = jnp.minimum(lengths + step, LENGTH - 1)[..., None]
        token = jnp.take_along_axis(tokens, at, axis=-1)[..., 0]
        logits, cache = decode_step(model, token, cache, memory)
        expected = jnp.take_along_axis(full, at[..., None], axis=-2)[..., 0, :]
        unfinished = lengths + step < LENGTH
        close(logits[unfinished], expected[unfinished])


def test_no_logit_depends_on_a_later_token(model, inputs):
    memory = encode(model, without(inputs, "text", "image"))
    memory = jax.tree.map(lambda x: x[:1], memory)
    h = jax.random.normal(jax.random.key(0), (1, 1, LENGTH, model.config.embed_dim))
    jacobian = jax.jit(jax.jacrev(lambda h: model.logits(model.decoder(h, memory)[0])[0, 0, :, 0]))(
        h
    )
    depends = np.abs(jacobian[:, 0, 0]).max(axis=-1) > 0
    np.testing.assert_array_equal(depends, np.tri(LENGTH, dtype=bool))


def test_right_pads_change_nothing_before_them(model, inputs):
    memory = encode(model, inputs)
    padded = np.array(TOKENS)
    padded[..., 4:] = 0
    close(decode(model, padded, memory)[..., :4, :], decode(model, TOKENS, memory)[..., :4, :])


def test_one_encode_serves_every_question(model, inputs):
    logits = forward(model, TOKENS, inputs)
    assert logits.shape == (2, 3, LENGTH, VOCAB)
    repeated = jax.tree.map(lambda x: np.repeat(x, 3, axis=0), inputs)
    alone = forward(model, TOKENS.reshape(6, LENGTH), repeated)
    close(logits.reshape(alone.shape), alone)


def test_batch_mates_change_nothing(model, inputs):
    together = forward(model, TOKENS, inputs)
    for row in range(2):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], (TOKENS, inputs))
        close(forward(model, *one)[0], together[row])


# --- Absent inputs


@pytest.mark.parametrize("name", STREAMS)
def test_an_absent_stream_is_one_whose_mask_is_all_false(model, inputs, name):
    absent, hidden = without(inputs, name), masked(inputs, slice(None), name)
    results = (logits_and_gradients(model, TOKENS, x) for x in (absent, hidden))
    (expected, exact), (logits, found) = jax.device_get([*results])
    close(logits, expected)
    # Finite, and 0 for all that belongs to the stream alone.
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(exact))
    jax.tree.map(lambda x, y: close(x / scale, y / scale), found, exact)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_may_be_absent_in_some_rows(model, inputs, name):
    logits = forward(model, TOKENS, masked(inputs, 0, name))
    close(logits[0], logits_and_gradients(model, TOKENS, without(inputs, name))[0][0])
    close(logits[1], forward(model, TOKENS, inputs)[1])


def test_a_row_without_any_input_is_finite_and_leaves_the_others_alone(model, inputs):
    empty = masked(inputs, 0, *STREAMS)
    logits, gradients = logits_and_gradients(model, TOKENS, empty)
    assert np.isfinite(logits[0]).all()
    close(logits[1], forward(model, TOKENS, inputs)[1])
    of_embeddings = compiled(jax.grad(lambda model: model.embed(empty).sum()), model)
    for g in jax.tree.leaves([gradients, of_embeddings]):
        assert np.isfinite(g).all()


def test_padded_text_is_the_shorter_text(model, inputs):
    short = Inputs(text=inputs.text[:, :4])
    padded = Inputs(text=inputs.text, text_mask=jnp.tile(jnp.arange(6) < 4, (2, 1)))
    close(forward(model, TOKENS, padded), forward(model, TOKENS, short))


def test_text_has_an_order(model, inputs):
    text = jnp.array([[1, 2, 3, 4, 5, 6]] * 2)
    one, turned = (forward(model, TOKENS, Inputs(text=x)) for x in (text, text[:, ::-1]))
    assert np.abs(one - turned).max() > 1e-4


def test_text_is_rotated_only_against_text(build, inputs):
    """What an image token reads in the joint block does not depend on where words are, and what a
    word reads from the image does not depend on where it is itself."""
    pads = np.full((2, 4), 3, np.int32)
    shifted = dataclasses.replace(
        inputs,
        text=np.concatenate([pads, inputs.text], axis=1),
        text_mask=np.concatenate([pads != 3, inputs.text_mask], axis=1),
    )
    moved = {}
    for rotates_all in (False, True):
        model = build(rotate_all_streams=rotates_all)
        near, far = (run_parts(model, each)[0] for each in (inputs, shifted))
        moved[rotates_all] = max(
            np.abs(far[0].tokens[:, 4:] - near[0].tokens).max(),
            *(np.abs(b.tokens - a.tokens).max() for a, b in zip(near[1:], far[1:], strict=True)),
        )
    assert moved[False] < 1e-5 < 1e-3 < moved[True]


def test_normed_queries_and_keys_do_not_depend_on_their_scale(build, inputs):
    model = build(qk_norm=True, num_memory_tokens=3)
    larger = nnx.clone(model)
    shared = larger.processes.stack.layers[0]
    attentions = [larger.level_one.block.attention, shared.isolated]
    attentions += [larger.fusion.cross_modal.attention, larger.fusion.bottleneck.attention]
    for attention in attentions:
        attention.query.kernel[...] *= 8.0
        attention.key.kernel[...] *= 4.0
    shared.query.kernel[...] *= 8.0
    larger.level_one.key.kernel[...] *= 4.0
    close(encode(larger, inputs).c_mem, encode(model, inputs).c_mem, 1e-4)


def test_the_decoder_does_not_depend_on_the_scale_of_its_embeddings(build, inputs):
    model = build(decoder_input_norm=True)
    memory = encode(model, inputs)
    larger = nnx.clone(model)
    larger.embedding.embedding[...] *= 16.0
    # The epsilon of the norm is a part of 400 of the smaller embeddings.
    close(decode(larger, TOKENS, memory), decode(model, TOKENS, memory), 1e-2)


@pytest.mark.parametrize("slots", [False, True])
def test_aux_vectors_are_a_set_unless_their_slots_have_meaning(build, inputs, slots):
    model = build(aux_slots=slots)
    one = Inputs(aux=inputs.aux)
    other = Inputs(aux=inputs.aux[:, [2, 0, 1]])
    difference = np.abs(forward(model, TOKENS, one) - forward(model, TOKENS, other)).max()
    assert difference > 1e-4 if slots else difference < 1e-5


def test_wrong_inputs_are_refused_in_words(build, model, inputs):
    with pytest.raises(ValueError, match="give at least one of text, image and aux"):
        jax.eval_shape(model.encode, Inputs())
    with pytest.raises(ValueError, match="aux vectors of 4 numbers, expected aux_dim=5"):
        jax.eval_shape(model.encode, Inputs(aux=inputs.aux[..., :4]))
    with pytest.raises(ValueError, match="17 aux vectors, expected at most max_aux=16"):
        jax.eval_shape(build(aux_slots=True).encode, Inputs(aux=jnp.zeros((1, 17, 5))))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("text", ["red circle"], "text is a list; expected an array of token ids [B, S]"),
        ("text", np.zeros(3, np.int32), "text is int32[3]; expected token ids [B, S]"),
        ("text", np.zeros((2, 3)), "text is float64[2, 3]; expected token ids"),
        ("image", np.zeros((2, 24, 24, 3)), "image is float64[2, 24, 24, 3]; expected uint8 pix"),
        ("image", np.zeros((24, 24, 3), np.uint8), "image is uint8[24, 24, 3]; expected uint8"),
        ("image", np.zeros((2, 3, 24, 24), np.uint8), "image is uint8[2, 3, 24, 24]; expected"),
        ("image_mask", np.ones((2, 1), bool), "image_mask is [2, 1]; expected [2]"),
        ("image_mask", np.ones((2, 1, 1), bool), "image_mask is bool[2, 1, 1]; expected True and"),
        ("aux", np.zeros((2, 3, 5), np.int32), "aux is int32[2, 3, 5]; expected floats [B, "),
        ("aux", np.zeros((3, 5), np.float32), "aux is float32[3, 5]; expected floats [B, "),
        ("aux_mask", np.ones((2, 3), np.int32), "aux_mask is int32[2, 3]; expected True and"),
        ("aux", np.zeros((1, 3, 5), np.float32), "batch sizes: text 2, text_mask 2, image 2, ima"),
        ("text_mask", np.ones((2, 1), bool), "text_mask is [2, 1]; expected [2, 6]"),
        ("aux_mask", np.ones((2, 4), bool), "aux_mask is [2, 4]; expected [2, 3]"),
        ("image", None, "image_mask without image; give both, or neither"),
    ],
)
def test_an_input_that_would_be_misread_is_named(model, inputs, part, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.encode(dataclasses.replace(inputs, **{part: value}))


# --- Four processes


def test_the_four_processes_start_differently(model):
    for path, x in nnx.to_flat_state(nnx.state(model.processes.stack)):
        pairs = itertools.combinations(np.asarray(x[...]), 2)
        same = [np.array_equal(a, b) for a, b in pairs]
        assert len(same) == 6
        # Norms start at a constant.
        assert all(same) if path[-1] == "scale" else not any(same), path


def test_the_four_processes_drop_out_differently(build, inputs):
    model = build(dropout=0.5)
    streams, bank, _ = run_parts(model, inputs)
    graphdef, state = nnx.split(model.processes)
    equal = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), state))
    run = jax.jit(lambda key: equal(streams, bank, key=key)[0])
    for a, b in itertools.combinations(run(None), 2):
        np.testing.assert_array_equal(a, b)
    for a, b in itertools.combinations(run(jax.random.key(0)), 2):
        assert np.abs(a - b).max() > 0.01


def test_the_vmapped_processes_are_a_loop_over_them(model, parts):
    streams, bank, y = parts
    assert y.shape[0] == 4
    one = jax.jit(lambda process: process(streams, bank)[0])
    for p in range(4):
        close(one(jax.tree.map(lambda x, p=p: x[p], model.processes.stack)), y[p])


def test_one_process_changed_changes_its_own_output_only(model, parts):
    streams, bank, _ = parts
    run = jax.jit(lambda processes: processes(streams, bank)[0])
    y = run(model.processes)
    changed = run(jax.tree.map(lambda x: x.at[2].mul(1.1), model.processes))
    for p in range(4):
        assert np.array_equal(y[p], changed[p]) is (p != 2)


def test_isolated_attention_sees_its_own_stream_only(model, parts):
    streams, _, _ = parts
    process = jax.tree.map(lambda x: x[0], model.processes.stack)
    h = jnp.concatenate([stream.tokens for stream in streams], axis=1)
    for i in range(len(streams)):

        def outputs(h, i=i):
            return split(process.layers[0]._isolated_attention(h, streams), streams)[i].sum()

        grads = split(jax.jit(jax.grad(outputs))(h), streams)
        assert [bool(g.any()) for g in grads] == [i == j for j in range(len(streams))]


def test_shared_attention_sees_every_stream(model, parts):
    streams, bank, _ = parts

    @jax.jit
    @jax.grad
    def influence(values, i):
        y, _ = model.processes(streams, bank._replace(v=values))
        return sum(jnp.where(i == j, p.sum(), 0) for j, p in enumerate(split(y, streams)))

    for i in range(len(streams)):
        flat = influence(bank.v, i).reshape(2, -1, model.config.embed_dim)
        seen = [bool(g[0].any()) for g in split(flat, streams)]
        assert seen == [True] * len(streams)
        # The image of the second row is absent.
        assert not split(flat, streams)[1][1].any()


def test_shared_attention_may_have_its_own_number_of_heads(build, inputs):
    model = build(shared_num_heads=8)
    output = jax.jit(lambda model: model(TOKENS, inputs, attention=True))(model)
    assert output.attention.processes.shape[3] == 8
    assert output.attention.decoder.shape[2] == model.config.num_heads == 2
    layer = model.processes.stack.layers[0]
    assert layer.query.kernel.shape == (4, 32, 8, 4) and layer.query_bias.shape == (4, 8, 4)
    assert layer.isolated.query.kernel.shape == (4, 32, 2, 16)


# --- Fusion


def test_cross_modal_is_exactly_0_without_another_stream(model, inputs, parts):
    streams, _, y = parts
    cross_modal, mean = jax.jit(model.fusion.cross_modal), y.mean(axis=0)
    alone = split(mean, streams)[1]
    np.testing.assert_array_equal(cross_modal(alone, streams[1:2]), 0)
    absent = jnp.zeros((2, streams[1].tokens.shape[1]), bool).at[1].set(True)
    masks = [~jnp.zeros(streams[0].tokens.shape[:2], bool), absent, jnp.zeros((2, 3), bool)]
    masks[0] = masks[0].at[1].set(False)
    some = [s._replace(mask=mask) for s, mask in zip(streams, masks, strict=True)]
    # Row 0 has text alone, row 1 the image alone.
    text, image, _ = split(cross_modal(mean, some), streams)
    np.testing.assert_array_equal(text[0], 0)
    np.testing.assert_array_equal(image[1], 0)
    assert text[1].any()


def test_fusion_is_its_formula(model, parts):
    streams, _, y = parts
    fusion, dim = model.fusion, model.config.embed_dim
    x = jnp.concatenate([stream.tokens for stream in streams], axis=1)
    modality = np.repeat(np.arange(3), [s.tokens.shape[1] for s in streams])
    present = jnp.concatenate([s.mask for s in streams], axis=1)
    other = (modality[:, None] != modality)[None] & present[:, None]

    @jax.jit
    def expected(x, y):
        mean = sum(y) / 4
        f = x + mean
        for p in range(4):
            f += y[p] @ fusion.concat.kernel[p * dim : (p + 1) * dim]
        attention, tokens = fusion.cross_modal.attention, fusion.cross_modal.norm(mean)
        q, k, v = attention.query(tokens), attention.key(tokens), attention.value(tokens)
        f += attention.out(attend(q, k, v, other))
        return f + fusion.mlp(fusion.norm(f))

    fused, mask, _ = compiled(fusion, y, streams)
    close(fused, expected(x, y))
    np.testing.assert_array_equal(mask, present)


def test_the_blocks_of_the_bottleneck_run_over_the_memory_tokens(build, parts):
    streams, _, y = parts
    model = nnx.clone(build(num_memory_tokens=3, num_bottleneck_blocks=2))
    with_blocks = model.fusion(y, streams).tokens
    blocks, model.fusion.bottleneck.blocks = model.fusion.bottleneck.blocks, nnx.List([])
    memory = model.fusion(y, streams).tokens
    for block in blocks:
        memory = block(memory)
    close(with_blocks, memory)


def test_bottleneck_gives_its_number_of_tokens_and_none_to_a_row_without_input(build, inputs):
    model = build(num_memory_tokens=5)
    memory = encode(model, masked(inputs, 0, *STREAMS))
    assert memory.c_mem.shape == (2, 5, model.config.kv_lora_rank)
    np.testing.assert_array_equal(memory.mask, [[False] * 5, [True] * 5])
    assert np.abs(memory.c_mem[1, 0] - memory.c_mem[1, 1]).max() > 0.01
    assert encode(model, masked(inputs, 0, "image")).mask.all()
    assert encode(model, Inputs(aux=inputs.aux)).mask is None
    logits = forward(model, TOKENS, masked(inputs, 0, *STREAMS))
    close(logits[1], forward(model, TOKENS, inputs)[1])
    assert jnp.isfinite(logits).all()


# --- Images


@pytest.mark.parametrize(("encoder", "tokens"), [("resnet", 16), ("vit", 64)])
def test_every_pixel_reaches_the_image_tokens(build, encoder, tokens):
    image = ImageConfig(encoder, size=24, stage_widths=(8, 16), num_layers=1)
    streams = build(image=image).streams
    pixels = jax.random.normal(jax.random.key(0), (1, 24, 24, 3))
    weights = jax.random.normal(jax.random.key(1), (1, tokens, 32))
    grads = jax.jit(jax.grad(lambda pixels: jnp.sum(streams.image(pixels) * weights)))(pixels)
    assert grads.all()


@pytest.mark.parametrize("encoder", ["resnet", "vit"])
def test_image_tokens_know_their_place(build, encoder):
    image = ImageConfig(encoder, size=24, stage_widths=(8, 16), num_layers=0)
    blank = jax.jit(build(image=image).streams.image.__call__)(jnp.ones((1, 48, 48, 3)))[0]
    # Away from the border equal pixels differ by their place alone.
    side = int(len(blank) ** 0.5)
    inner = blank.reshape(side, side, -1)[2:-2, 2:-2].reshape(-1, 32)
    distances = np.linalg.norm(inner[:, None] - inner[None], axis=-1)
    assert (distances + np.eye(len(inner))).min() > 0.1


def test_vit_refuses_a_size_that_is_no_multiple_of_its_patch(build, make_inputs):
    image = ImageConfig("vit", size=24, num_layers=1)
    inputs = without(make_inputs(size=25), "text", "aux")
    with pytest.raises(ValueError, match="25 x 25 pixels: expected multiples of the patch size 3"):
        jax.eval_shape(build(image=image).encode, inputs)


def test_resnet_takes_any_size(build, make_inputs):
    model = build(image=ImageConfig("resnet", size=24, stage_widths=(8, 16), num_layers=1))
    for size, tokens in ((24, 16), (25, 25)):
        memory = jax.eval_shape(model.encode, Inputs(image=make_inputs(size=size).image))
        assert memory.c_mem.shape[1] == tokens
    with pytest.raises(ValueError, match="image of 6 x 5 pixels: expected a side of more than 6"):
        jax.eval_shape(model.encode, Inputs(image=jnp.zeros((1, 6, 5, 3), jnp.uint8)))


# --- Alignment


def test_embeddings_have_length_1_and_no_embedding_depends_on_absent_tokens(model, inputs):
    embed = jax.jit(SlamV3.embed)
    whole = embed(model, without(masked(inputs, 0, "text"), "image"))
    close(jnp.linalg.norm(whole, axis=-1), 1)
    close(whole[0], embed(model, Inputs(aux=inputs.aux))[0])


def test_alignment_loss_is_a_sum_over_all_pairs(model):
    a, b = jax.random.normal(jax.random.key(0), (2, 4, 8)) / 3
    temperature, bias = np.exp(model.alignment.log_temperature[...]), model.alignment.bias[...]
    total = 0.0
    for i, j in itertools.product(range(4), range(4)):
        sign = 1 if i == j else -1
        total += np.log1p(np.exp(-sign * (temperature * np.dot(a[i], b[j]) + bias)))
    close(model.alignment.loss(a, b), total / 4)


# --- The model as a value


def test_jit_grad_and_vmap_take_the_model_as_an_argument(build, model, inputs):
    aux, tokens = Inputs(aux=inputs.aux), TOKENS[:, 0]
    expected = forward(model, tokens, aux)
    pair = jax.tree.map(lambda x: np.stack([x, 1.1 * x]).astype(x.dtype), model)
    both = jax.jit(jax.vmap(forward, in_axes=(0, None, None)))(pair, tokens, aux)
    close(both[0], expected)
    assert np.abs(both[1] - expected).max() > 1e-3
    _, grads = logits_and_gradients(model, TOKENS, inputs)
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(model))
    assert grads["processes"]["stack"]["instruction"][...].any()


def test_dropout_follows_its_key(build, inputs):
    model = build(dropout=0.5)
    aux = Inputs(aux=inputs.aux)
    one, two, three = (forward(model, TOKENS, aux, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - three).max() > 0.01
    assert np.abs(one - forward(model, TOKENS, aux)).max() > 0.01


def test_computing_in_bfloat16_keeps_parameters_and_logits_float32(build, model, inputs):
    half = build(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    logits = forward(half, TOKENS, inputs)
    assert logits.dtype == jnp.float32
    assert encode(half, inputs).c_mem.dtype == jnp.bfloat16
    close(logits, forward(model, TOKENS, inputs), 0.15)
    # Sums are not rounded to bfloat16 on their way.
    states = 8 * jax.random.normal(jax.random.key(0), (5, 32), jnp.bfloat16)
    kernel = jnp.float32(half.head.kernel[...].astype(jnp.bfloat16))
    close(half.logits(states), jnp.float32(states) @ kernel, 1e-4)


def test_numbers_are_read_as_they_are_in_bfloat16(build):
    half = build(dtype="bfloat16", aux_slots=True)
    one, other = (jnp.full((1, 3, 5), x) for x in (1_000.0, 1_001.0))
    with jax.numpy_dtype_promotion("standard"):
        tokens = [half.streams._aux(x) for x in (one, other)]
    assert np.abs(tokens[1] - tokens[0]).max() > 0.1


@pytest.mark.parametrize("shape", [(0, 3, LENGTH), (2, 0, LENGTH)])
def test_a_batch_of_none_has_no_logits(model, shape):
    inputs = Inputs(aux=jnp.zeros((shape[0], 3, 5)))
    found = jax.eval_shape(model, jnp.zeros(shape, jnp.int32), inputs)
    assert found.logits.shape == (*shape, VOCAB)


# --- Configuration


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        *((name, 0, "at least 1") for name in ("vocab_size", "num_heads", "kv_lora_rank")),
        ("embed_dim", 33, "multiple of num_heads=2, such as 32"),
        ("embed_dim", 30, "even width, such as 32"),
        ("shared_num_heads", 3, "a divisor of embed_dim=32"),
        ("shared_num_heads", 0, "at least 1"),
        ("qk_nope_head_dim", 0, "at least 1"),
        ("qk_rope_head_dim", 5, "an even number, such as 6"),
        ("q_lora_rank", 0, "at least 1"),
        ("window", 0, "at least 1"),
        ("num_memory_tokens", -1, "at least 0"),
        ("dropout", 1.0, "a rate"),
        ("dtype", "int8", "one of"),
        ("param_dtype", "float", "one of"),
        ("image.encoder", "cnn", "one of"),
        ("image.size", 0, "at least 1"),
        ("image.size", 12, "more than 12, or fewer stages"),
        ("mlp_dim", 48.0, "a whole number"),
        ("text_kernel_size", -1, "at least 0"),
        ("text_kernel_size", 1 << 20, "at most 4,?096"),
        ("num_heads", True, "a whole number"),
        ("image.patch_size", 0, "at least 1"),
        ("image.num_layers", -1, "at least 0"),
        ("image.stage_widths", (), "at least one width"),
        ("image.stage_widths", (8, 12), "multiples of 8"),
    ],
)
def test_a_bad_field_is_named_with_what_would_do(field, value, expected):
    group, _, name = field.rpartition(".")
    with pytest.raises(ConfigError, match=rf"^{field} is .*; expected .*{expected}"):
        if group:
            ImageConfig(**{name: value})
        else:
            SlamV3Config.preset("tiny", **{"vocab_size": VOCAB, name: value})


def test_new_models_have_defaults_that_a_stored_configuration_does_not_mean():
    fields = ("decoder_input_norm", "rotate_all_streams", "text_kernel_size", "matmul_precision")
    new, stored = SlamV3Config.preset("tiny", VOCAB), SlamV3Config(VOCAB)
    assert [getattr(new, name) for name in fields] == [True, False, 4, "float32"]
    assert [getattr(stored, name) for name in fields] == [False, True, 0, None]


def test_vit_size_is_checked_where_it_is_configured():
    with pytest.raises(ConfigError, match=r"^image\.size is 25; expected a multiple .* such as 24"):
        ImageConfig("vit", size=25)


def test_derived_widths_follow_the_head_width_and_can_be_set():
    config = SlamV3Config(VOCAB, embed_dim=96, num_heads=4)
    assert config.head_dim == 24 and [*config.latent_widths.values()] == [24, 12, 24]
    wider = dataclasses.replace(config, embed_dim=192, v_head_dim=7)
    assert [*wider.latent_widths.values()] == [48, 24, 7]


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x == "tiny" else pytest.mark.release) for x in PRESETS]
)
def test_every_preset_builds(name):
    config = SlamV3Config.preset(name, VOCAB)
    model = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
    millions = sum(x.size for x in jax.tree.leaves(nnx.state(model))) / 1e6
    low, high = {"tiny": (0, 0.2), "small": (0.5, 2), "medium": (10, 40), "base": (200, 500)}[name]
    assert low < millions < high
