"""Answers are the same for a request alone, in a batch, streamed, and from a kept memory."""

import dataclasses
import io
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from slam_jax.data import AuxFormat, Tokenizer
from slam_jax.errors import InputError
from slam_jax.generation import (
    ModelAndTokenizer,
    Request,
    Sampling,
    encode,
    generate,
    score,
    stream,
)
from slam_jax.generation.decode import start_decoding
from slam_jax.generation.requests import read_inputs, read_prompts
from slam_jax.language_models import make_config, make_model
from slam_jax.slam_v3 import SlamV3, SlamV3Config
from slam_jax.training import Loaded

WORDS = ["shape of red", "left half: blue", "circle", "yes", "größer als 日本", "red green blue"]


def make_loaded(scale: float = 0.4, **changes: Any) -> Loaded:
    """A model of random weights, larger than an initialisation's: its answers differ."""
    tokenizer = Tokenizer.train(WORDS * 9, 300)
    config = SlamV3Config.preset("tiny", tokenizer.vocab_size, context_length=64, **changes)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.array(rng.normal(0, scale, p.shape), p.dtype), shapes)
    return Loaded(nnx.merge(graphdef, params), tokenizer, None, {}, 1)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return make_loaded()


def picture(seed: int, size: tuple[int, int] = (24, 24)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def vectors(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 5))


UNEQUAL = [
    Request("shape of red", image=picture(1), seed=1),
    Request("left half: blue and then some more of it", text="red circle", seed=2),
    Request("", aux=vectors(3, 3), seed=3),
    Request("yes", text="größer als 日本 " * 3, image=picture(4, (40, 17)), seed=4),
    Request("circle", text="red", image=picture(5), aux=vectors(5, 7), seed=5),
]
DRAWN = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95, num_samples=3)


GREEDY = Sampling(max_new_tokens=12, num_samples=3)


@pytest.mark.release
@pytest.mark.parametrize("sampling", [pytest.param(GREEDY, marks=pytest.mark.slow), DRAWN])
def test_a_batch_of_unequal_requests_is_the_same_one_by_one(loaded, sampling):
    together = generate(loaded, UNEQUAL, sampling)
    for request, answer in zip(UNEQUAL, together, strict=True):
        [alone] = generate(loaded, [request], sampling)
        assert [s.tokens for s in alone.samples] == [s.tokens for s in answer.samples]
        assert alone.text == answer.text and alone.samples[0].finish == answer.samples[0].finish
        for a, b in zip(alone.samples, answer.samples, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5, rtol=1e-5)
    assert len({answer.text for answer in together}) > 3


def test_logits_of_a_batch_are_those_of_its_requests_alone(loaded):
    @jax.jit
    def logits(inputs, prompts):
        return loaded.model.decode(prompts.tokens, loaded.model.encode(inputs))

    def of(requests):
        prompts = read_prompts(loaded, requests, 1)
        return np.asarray(logits(read_inputs(loaded, requests), prompts)), prompts.lengths

    together, lengths = of(UNEQUAL)
    for i, request in enumerate(UNEQUAL):
        alone, _ = of([request])
        real = lengths[i]
        np.testing.assert_allclose(alone[0, :real], together[i, :real], atol=1e-5, rtol=1e-5)


def test_a_seed_gives_its_text_and_another_seed_another(loaded):
    def texts(seed):
        [answer] = generate(loaded, [Request("red", image=picture(1), seed=seed)], DRAWN)
        return [sample.text for sample in answer.samples]

    assert texts(7) == texts(7)
    assert len({*texts(7), *texts(8)}) == 6


@pytest.mark.parametrize(("temperature", "stop"), [(0.0, ()), (1.0, ("e", "日"))])
def test_streamed_pieces_joined_are_the_text_of_generate(loaded, stop, temperature):
    sampling = Sampling(max_new_tokens=23, temperature=temperature, stop=stop)
    some = 0
    for request in (*UNEQUAL[2:4], dataclasses.replace(UNEQUAL[2], seed=7)):
        pieces = list(stream(loaded, request, sampling))
        [answer] = generate(loaded, [request], sampling)
        assert "".join(pieces) == answer.text
        assert all(pieces)
        some += len(pieces) > 1
    assert some or stop


def test_prompts_about_a_kept_memory_get_the_same_answers_as_whole_requests(loaded):
    scene = UNEQUAL[4]
    memory = encode(loaded, scene)
    prompts = ["circle", "shape of red", ""]
    kept = generate(loaded, [Request(p, seed=5) for p in prompts], DRAWN, memory=memory)
    for prompt, answer in zip(prompts, kept, strict=True):
        fresh = Request(prompt, scene.text, scene.image, scene.aux, seed=5)
        [expected] = generate(loaded, [fresh], DRAWN)
        assert [s.tokens for s in answer.samples] == [s.tokens for s in expected.samples]
    pieces = stream(loaded, Request("circle", seed=5), DRAWN, memory=memory)
    assert "".join(pieces) == kept[0].text


def test_logprobs_are_those_of_the_model_and_scores_their_sum(loaded):
    request = UNEQUAL[3]
    [answer] = generate(loaded, [request], DRAWN)
    tokenizer = loaded.tokenizer
    memory = encode(loaded, request)
    decode = jax.jit(loaded.model.decode)
    start = [tokenizer.bos_id, *tokenizer.encode(request.prompt)]
    for sample in answer.samples:
        tokens = np.array([start + list(sample.tokens)], np.int32)
        logprobs = jax.nn.log_softmax(decode(tokens, memory))[0, len(start) - 1 : -1]
        expected = [float(row[token]) for row, token in zip(logprobs, sample.tokens, strict=True)]
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
    choices = ["red", "", "größer als 日本"]
    for scored, choice in zip(score(loaded, request, choices), choices, strict=True):
        rows = [*tokenizer.encode(choice), tokenizer.eos_id]
        logits = decode(np.array([start + rows], np.int32), memory)[0]
        logprobs = jax.nn.log_softmax(logits)[len(start) - 1 :]
        expected = sum(float(row[token]) for row, token in zip(logprobs, rows, strict=False))
        assert scored.text == choice and scored.num_tokens == len(rows)
        assert math.isclose(scored.logprob, expected, abs_tol=1e-4)
    kept = score(loaded, Request(request.prompt), choices, memory=memory)
    np.testing.assert_allclose(
        [s.logprob for s in kept], [s.logprob for s in score(loaded, request, choices)], atol=1e-4
    )


def test_an_answer_ends_before_a_stop_string_however_its_bytes_are_split_into_tokens(loaded):
    plain = Sampling(max_new_tokens=24, temperature=1.0, num_samples=8)
    [free] = generate(loaded, [UNEQUAL[4]], plain)
    found = (re.search("[!-~]{2}", sample.text[2:]) for sample in free.samples)
    stops = [pair.group() for pair in found if pair][:2]
    stopped = 0
    [answer] = generate(
        loaded,
        [UNEQUAL[4]],
        Sampling(max_new_tokens=24, temperature=1.0, num_samples=8, stop=stops),
    )
    for sample, whole in zip(answer.samples, free.samples, strict=True):
        places = [p for stop in stops if (p := whole.text.find(stop)) >= 0]
        if not places:
            assert sample == whole
            continue
        stopped += 1
        assert sample.text == whole.text[: min(places)] and sample.finish == "stop"
        assert sample.tokens == whole.tokens[: len(sample.tokens)]
        assert len(sample.tokens) == len(sample.logprobs) < len(whole.tokens)
    assert stopped


@pytest.mark.release
def test_many_prompts_compile_once_per_bucket(loaded):
    rng = np.random.default_rng(0)
    compiled: Any = start_decoding
    before, live, buckets = compiled._cache_size(), [], set()
    for _ in range(200):
        length = int(rng.integers(0, 25))
        request = Request("x" * length, aux=vectors(0, int(rng.integers(1, 3))))
        inputs: Any = read_inputs(loaded, [request])
        buckets.add((read_prompts(loaded, [request], 4).tokens.shape, inputs.aux.shape))
        generate(loaded, [request], Sampling(max_new_tokens=int(rng.integers(1, 5))))
        live.append(len(jax.live_arrays()))
    assert 2 < len(buckets) <= 6
    assert compiled._cache_size() - before <= len(buckets)
    assert max(live[100:]) <= max(live[:100])


def test_pictures_of_any_kind_are_the_same_request(loaded, tmp_path):
    image = Image.fromarray(picture(9))
    image.save(tmp_path / "p.png")
    forms = [picture(9), image, tmp_path / "p.png", str(tmp_path / "p.png")]
    forms.append((tmp_path / "p.png").read_bytes())
    answers = generate(loaded, [Request("red", image=form) for form in forms], Sampling(8))
    assert len({answer.samples[0].tokens for answer in answers}) == 1


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "no request; give at least one"),
        ([Request("red")], "nothing to answer from: give at least one of text, image and aux"),
        ([UNEQUAL[0], Request("red", text="")], "request 1: nothing to answer from"),
        ([Request("red " * 70, text="red")], r"prompt of \d+ tokens and 4 new ones; the context"),
        ([Request("red", text="ü " * 70)], r"text of \d+ tokens; the context is 64: shorten it"),
        ([Request("red", aux=np.zeros((2, 4)))], "aux is 2 x 4 numbers; expected rows of 5"),
        ([Request("red", aux="much")], "aux is no table of numbers"),
        ([Request("red", aux=[[1, 2, 3, 4, None]])], "aux has a number that is missing"),
        ([Request("red", aux=[[1e300] * 5])], r"aux has a number beyond 1e\+30; give smaller ones"),
        ([Request("red", aux=[[10**400] * 5])], "aux has an infinite number; give finite ones"),
        (
            [Request("red" * 10**5, text="red")],
            r"prompt of 300,000 characters; the context is 64 tokens of at most \d+: shorten it",
        ),
        ([Request("red", text="a" * 10**5)], "text of 100,000 characters; the context is 64 tok"),
        ([Request("red <eos>", text="red")], "prompt holds '<eos>', which is added by itself"),
        ([Request("red", text="a<pad>")], "text holds '<pad>', which is added by itself"),
        ([Request("red", image="no/such.png")], "no/such.png: no such file"),
        ([Request("red", image=b"GIF89a")], "the picture .*(known kind|cannot be read)"),
        (
            [Request("red", image=np.zeros((2, 2)))],
            r"float64\[2, 2\] is no picture",
        ),
        (
            [UNEQUAL[0], Request("red", image=png(Image.new("1", (10_000, 10_000))))],
            "request 1: the picture has 10,000 x 10,000 pixels; at most 64,000,000 are read",
        ),
        ([Request("red", text="a", seed=-1)], "seed is -1; expected a whole number from 0 to"),
        ([Request("red", text="a", seed="1")], "seed is '1'; expected a whole number"),  # type: ignore[arg-type]
        ([Request("red", text="a", seed=True)], "seed is True; expected a whole number"),
        ([Request(3, text="a")], "prompt is a int; expected a text"),  # type: ignore[arg-type]
    ],
)
def test_a_request_that_cannot_be_answered_is_explained_in_one_line(loaded, requests, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(loaded, requests, Sampling(max_new_tokens=4))
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_numbers(loaded):
    sampling = Sampling(max_new_tokens=np.int64(4), temperature=1.0, top_p=np.float32(0.5))  # type: ignore[arg-type]
    same = Sampling(max_new_tokens=4, temperature=1.0, top_p=0.5)
    one = generate(loaded, [Request("red", text="a", seed=np.int64(3))], sampling)  # type: ignore[arg-type]
    assert one == generate(loaded, [Request("red", text="a", seed=3)], same)


def test_the_default_length_is_that_of_the_training_data_and_a_cut_answer_says_so(loaded):
    long = loaded._replace(max_new_tokens=40)
    [usual, longer] = (generate(each, [UNEQUAL[2]])[0].samples[0] for each in (loaded, long))
    assert len(usual.tokens) == 32 and len(longer.tokens) == 40
    assert usual.finish == longer.finish == "length"
    assert longer.tokens[:32] == usual.tokens
    pieces = stream(long, UNEQUAL[2])
    assert pieces.finish is None
    assert "".join(pieces) == longer.text and pieces.finish == "length"
    # What is left of the context is less, for this request alone.
    prompt = "x" * 40
    short, other = generate(long, [Request(prompt, aux=UNEQUAL[2].aux), UNEQUAL[2]])
    assert len(short.samples[0].tokens) == 64 - 1 - len(loaded.tokenizer.encode(prompt)) < 32
    assert other.samples[0].tokens == longer.tokens


def test_a_tokenizer_of_another_size_than_the_model_is_refused(loaded):
    message = "the tokenizer has 259 tokens and the model [0-9]+; give the tokenizer that the model"
    fewer = loaded._replace(tokenizer=Tokenizer.train([""], 259))
    with pytest.raises(InputError, match=message):
        generate(fewer, [UNEQUAL[0]])
    with pytest.raises(InputError, match=message):
        ModelAndTokenizer(loaded.model, fewer.tokenizer)


def test_special_tokens_and_lone_surrogates_in_texts_are_refused(loaded):
    with pytest.raises(InputError, match="stop has half a letter in it"):
        Sampling(stop="\udcff")
    with pytest.raises(InputError, match="answer holds '<eos>'"):
        score(loaded, UNEQUAL[0], ["red<eos>"])


def test_inputs_beside_a_memory_are_refused(loaded):
    with pytest.raises(ValueError, match="a request has inputs beside `memory`"):
        generate(loaded, [UNEQUAL[0]], memory=encode(loaded, UNEQUAL[0]))


def test_numbers_by_column_name(loaded):
    rows = np.array([[1.0, 10.0], [3.0, 30.0], [5.0, np.nan]])
    table = loaded._replace(aux_format=AuxFormat.of_columns(("width", "price"), rows))
    sampling = Sampling(max_new_tokens=6)

    def tokens(aux):
        return generate(table, [Request("red", aux=aux)], sampling)[0].samples[0].tokens

    by_name = tokens({"price": 90, "width": 1.0})
    assert by_name == tokens([1.0, 90.0]) and by_name != tokens([90.0, 1.0])
    assert tokens({"width": 1.0}) == tokens([1.0, None]) != by_name
    with pytest.raises(ValueError, match="aux has no field 'prize'; did you mean 'price'"):
        tokens({"prize": 3})
    with pytest.raises(ValueError, match="aux is 3 numbers; expected 2, one for each of width"):
        tokens([1, 2, 3])


def test_a_bfloat16_mixture_gives_each_seed_its_answer_alone_and_in_a_batch():
    """Its logits differ in the last bits between batch sizes: nearly equal ones change places."""
    tokenizer = Tokenizer.train(WORDS * 9, 300)
    config = make_config("moe", "tiny", vocab_size=tokenizer.vocab_size, dtype="bfloat16")
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: make_model(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.array(rng.normal(0, 0.2, p.shape), p.dtype), shapes)
    mixture = ModelAndTokenizer(nnx.merge(graphdef, params), tokenizer)
    requests = [Request("shape of red", seed=seed) for seed in range(12)]
    sampling = Sampling(max_new_tokens=24, temperature=1.0)
    together = generate(mixture, requests, sampling)
    alone = [generate(mixture, [request], sampling)[0] for request in requests]
    assert [a.samples[0].tokens for a in alone] == [a.samples[0].tokens for a in together]
    # The noise hides it, but the logits do differ.
    assert any(
        a.samples[0].logprobs != b.samples[0].logprobs for a, b in zip(alone, together, strict=True)
    )


@pytest.mark.slow
def test_samples_follow_the_models_distribution(loaded):
    """2,000 first tokens against the probabilities of the filtered distribution."""
    sampling = Sampling(max_new_tokens=1, temperature=0.8, top_k=6, num_samples=1000)
    requests = [Request("red", text="circle", seed=seed) for seed in (1, 2)]
    answers = generate(loaded, requests, sampling)
    counts = Counter(s.tokens[0] for answer in answers for s in answer.samples)
    start = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode("red")]
    memory = encode(loaded, requests[0])
    logits = loaded.model.decode(np.array([start], np.int32), memory)[0, -1]
    best = np.argsort(-np.asarray(logits))[:6]
    probs = np.asarray(jax.nn.softmax(logits[best] / 0.8))
    assert set(counts) <= set(best.tolist())
    for token, prob in zip(best.tolist(), probs, strict=True):
        deviation = math.sqrt(2000 * prob * (1 - prob))
        assert abs(counts[token] - 2000 * prob) < 4.5 * deviation + 1
