"""Accuracies, their confidence intervals, and retrieval."""

import io
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slam_jax.data import Batch, EvaluationBatch, Example, Tokenizer, evaluation_batches
from slam_jax.data.scenes import Scenes
from slam_jax.data.sort_of_clevr import answer_table, make_scene
from slam_jax.evaluation import (
    bootstrap_interval,
    evaluate,
    most_frequent_answer,
    print_metrics,
    recall_at_k,
    retrieval_metrics,
    write_metrics,
)
from slam_jax.evaluation.likelihood import answer_likelihood
from slam_jax.reporting.checkpoint import open_checkpoint
from slam_jax.slam_v3 import Inputs, SlamV3, SlamV3Config
from slam_jax.training import split_model

PAD, BOS, EOS, QUESTION, ANSWERS = 0, 1, 2, 3, 4
VOCAB = 8


class WordTokenizer(Tokenizer):
    pad_id, bos_id, eos_id = PAD, BOS, EOS

    def __init__(self):
        """Without a model: a token's text is its number."""

    def decode(self, ids):
        ids = list(ids)
        return "".join(f"{i} " for i in ids[: ids.index(EOS)])


class Reader(nnx.Module):
    """Knows the answers: `aux` holds one per question. Embeds a stream as three of its numbers."""

    def __init__(self):
        self.bias = nnx.Param(jnp.zeros(()))
        self.traces = Trace()

    def encode(self, inputs, key=None):
        self.traces.count += 1
        return inputs.aux[..., 0].astype(jnp.int32)

    def init_cache(self, batch_shape, max_length):
        return jnp.zeros(batch_shape, jnp.int32)

    def prefill(self, tokens, cache, memory, *, lengths):
        # A leaked answer would be visible in the prompt and spoil the reply.
        leaked = jnp.any(tokens >= ANSWERS, axis=-1)
        reply = jnp.where(leaked, QUESTION, memory)
        logits = jax.nn.one_hot(reply, VOCAB)[..., None, :] + self.bias[...]
        return jnp.broadcast_to(logits, (*tokens.shape, VOCAB)), cache

    def decode_step(self, tokens, cache, memory):
        return jax.nn.one_hot(jnp.full_like(tokens, EOS), VOCAB), cache

    def decode_hidden(self, tokens, memory):
        """Each token, and what the model knows."""
        return jnp.stack([tokens, jnp.broadcast_to(memory[..., None], tokens.shape)], -1)

    def logits(self, states):
        token, memory = states[..., 0], states[..., 1]
        return jax.nn.one_hot(token, VOCAB) * memory[..., None] / 10

    def embed(self, inputs):
        given = inputs.text if inputs.image is None else inputs.image[:, 0, 0]
        return given / jnp.linalg.norm(given.astype(jnp.float32), axis=-1, keepdims=True)


class Trace:
    """Counts how often a model was traced."""

    count = 0


def batch(known, examples, **streams):
    """Questions of two tokens whose answers, all ANSWERS, follow in the same row."""
    scenes, questions = known.shape
    row = np.array([BOS, QUESTION, ANSWERS, EOS, PAD], np.int32)
    tokens: Any = np.broadcast_to(row, (scenes, questions, 5))
    inputs = Inputs(aux=known[..., None].astype(np.float32), **streams)
    lengths: Any = np.full((scenes, questions), 4, np.int32)
    whole = Batch(inputs, tokens, np.full_like(lengths, 2), lengths, paired=True)
    return EvaluationBatch(whole, examples, len(examples))


def scene(needs_both=(False, False)):
    kinds = ("non_relational", "relational")
    return Example(None, None, None, ("?", "?"), (f" {ANSWERS}",) * 2, kinds, needs_both)


def run(model, batches_by_view, **settings):
    graphdef, params = nnx.split(model, nnx.Param)
    tokenizer: Any = WordTokenizer()
    return evaluate(graphdef, params, batches_by_view, tokenizer, step=7, **settings)


def test_accuracy_counts_the_answers_that_are_equal_as_text_and_forgets_padding_rows():
    known = np.array([[4, 4], [4, 5], [4, 6], [7, 7]])  # the last scene is padding
    results = run(Reader(), {"aux": [batch(known[:2], [scene()] * 2), batch(known[2:], [scene()])]})
    entries = results.metrics["views"]["aux"]
    assert results.metrics["step"] == 7
    assert entries["non_relational"] == {"accuracy": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    assert entries["relational"]["accuracy"] == pytest.approx(1 / 3)
    assert entries["relational"]["n"] == 3
    assert set(entries) == {"non_relational", "relational"}
    relational = [a for a in results.answers if a.kind == "relational"]
    expected = [(0, "4 ", True), (1, "5 ", False), (2, "6 ", False)]
    assert [(a.scene, a.predicted, a.correct) for a in relational] == expected


def test_records_that_show_the_same_are_one_scene_in_all_views():
    """A view that skips a record counts on, so that scenes of views have equal numbers."""

    def shown(record, *contents):
        return scene()._replace(record=record, contents=contents)

    known = np.full((6, 2), 4)
    known[:3, 1] = 5  # the relational question of one picture is wrong
    records = [shown(0, b"a"), shown(1, b"a"), shown(2, b"a", b"b"), shown(4, b"c"), shown(5)]
    views = {
        "aux": [batch(known[:4], records[:4]), batch(known[4:5], records[4:])],
        "image": [batch(known[2:4], [shown(3, b"b"), records[3]])],
    }
    results = run(Reader(), views)
    found = [(a.view, a.record, a.scene) for a in results.answers if a.kind == "relational"]
    assert found[:5] == [("aux", r, s) for r, s in ((0, 0), (1, 0), (2, 0), (4, 4), (5, 5))]
    assert found[5:] == [("image", 3, 0), ("image", 4, 4)]
    relational = results.metrics["views"]["aux"]["relational"]
    correct = [[False] * 3, [True], [True]]
    expected = bootstrap_interval(correct, seed=0)
    assert (relational["low"], relational["high"]) == (expected.low, expected.high)


def test_the_loss_is_the_mean_over_the_tokens_of_expected_answers():
    known = np.array([[1, 2], [3, 4], [9, 9]])  # the last scene is padding
    given = {"aux": [batch(known, [scene()] * 2)], "text": [batch(known[:1], [scene()])]}
    # Never is the next token the one before it, which alone has a logit: known / 10.
    nats = np.log(np.exp(known / 10) + VOCAB - 1)
    losses = run(Reader(), given).losses
    assert losses == {
        "aux": pytest.approx(nats[:2].mean(), rel=1e-5),
        "text": pytest.approx(nats[0].mean(), rel=1e-5),
    }


def test_the_baseline_is_the_score_of_always_giving_the_most_frequent_answer():
    baseline = most_frequent_answer([" 4", "5", "4"])
    assert baseline == "4"
    examples = [scene()._replace(answers=(" 4", " 5")), scene()]
    batches = {"aux": [batch(np.full((2, 2), 6), examples)]}
    metrics = run(Reader(), batches, baseline_answer=baseline).metrics
    entries = metrics["views"]["aux"]
    assert entries["non_relational"]["baseline"] == 1.0
    assert entries["relational"]["baseline"] == 0.5 and entries["relational"]["accuracy"] == 0.0
    out = io.StringIO()
    print_metrics(metrics, file=out)
    assert 'baseline: always answering "4", the most frequent answer of' in out.getvalue()
    assert most_frequent_answer([]) is None


def test_questions_that_need_both_renderings_are_set_against_each_half_alone():
    examples = [scene((False, True)), scene((False, False)), scene((False, True))]
    both, image = np.array([[4, 4], [4, 5], [4, 4]]), np.array([[4, 4], [4, 4], [4, 5]])
    metrics = run(
        Reader(),
        {
            "split_image_text": [batch(both, examples)],
            "split_image_text_only_image": [batch(image, examples)],
            "split_image_text_only_text": [batch(np.full((3, 2), 6), examples)],
        },
    ).metrics
    entries = metrics["views"]["split_image_text"]
    figures = {entry: (e["accuracy"], e["n"]) for entry, e in entries.items()}
    assert figures == {
        "non_relational": (1.0, 3),
        "relational": (pytest.approx(2 / 3), 3),
        "needs_both": (1.0, 2),
        "needs_both_image_only": (0.5, 2),
        "needs_both_text_only": (0.0, 2),
    }
    assert list(metrics["views"]) == ["split_image_text"]


def test_retrieval_runs_over_all_scenes_of_the_view_with_text_and_image_of_one_scene():
    text = np.array([[9, 1, 1], [1, 9, 1], [1, 1, 9], [1, 1, 9]], np.int32)
    image = np.broadcast_to(text[:, None, None].astype(np.uint8), (4, 1, 1, 3))
    known = np.full((2, 2), 4)
    batches = [
        batch(known, [scene()] * 2, text=text[:2], image=image[:2]),
        batch(known, [scene()], text=text[2:], image=image[2:]),  # its second row is padding
    ]
    metrics = run(Reader(), {"image_text": batches}).metrics
    perfect = {"recall@1": 1.0, "recall@5": 1.0}
    assert metrics["retrieval"] == {"text_to_image": perfect, "image_to_text": perfect, "n": 3}


def test_one_compilation_serves_all_batches_of_a_view_and_later_calls():
    model = Reader()
    views = {"aux": [batch(np.full((2, 2), 4), [scene()] * 2)] * 3}
    run(model, views)
    model.bias[...] = jnp.ones(())
    run(model, views)
    assert model.traces.count == 1


def test_slam_v3_answers_a_scene_the_same_whatever_fills_its_batch():
    records = []
    for objects, questions in map(make_scene, range(4)):
        colour, kind, subtype = questions.T
        truth = answer_table(objects)[kind, colour, subtype]
        records.append({"objects": objects, "questions": questions, "answers": truth})
    tokenizer = Tokenizer.train(Scenes(records).corpus(), 400)
    config = SlamV3Config.preset("tiny", tokenizer.vocab_size, aux_dim=10, num_decoder_layers=1)
    shapes = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(shapes, nnx.Param)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.array(rng.normal(0, 0.6, p.shape), p.dtype), shapes)

    def run_on(*scenes):
        view = "split_image_aux_only_aux"
        source = Scenes([records[i] for i in scenes])
        batches = {view: evaluation_batches(source, tokenizer, view, 2, seed=0)}
        return evaluate(graphdef, params, batches, tokenizer, step=0, max_new_tokens=3)

    def answers_to(results, scene):
        return [answer for answer in results.answers if answer.scene == scene]

    even, odd = run_on(0, 1, 2, 3), run_on(0, 3, 2)
    for scene in (0, 2):  # beside another scene and, in the second run, beside padding
        assert answers_to(even, scene) == answers_to(odd, scene)
    assert (len(even.answers), len(odd.answers)) == (80, 60)
    assert len({answer.predicted for answer in even.answers}) > 10
    assert all(answer.references == (answer.expected,) for answer in even.answers)
    needed = sum(answer.needs_both for answer in even.answers)
    assert even.metrics["views"]["split_image_aux"]["needs_both_aux_only"]["n"] == needed > 0


def test_the_interval_resamples_scenes_not_questions():
    rng = np.random.default_rng(0)
    independent = rng.random((100, 20)) < 0.5
    together = np.repeat(rng.random((100, 1)) < 0.5, 20, axis=1)
    width = {}
    for name, correct in (("independent", independent), ("together", together)):
        interval = bootstrap_interval(correct, seed=0)
        assert interval.low < correct.mean() < interval.high
        assert interval.mean == pytest.approx(correct.mean())
        width[name] = interval.high - interval.low
    # Standard errors: 0.5 / sqrt(2000) and 0.5 / sqrt(100).
    assert width["independent"] == pytest.approx(2 * 1.96 * 0.5 / 2000**0.5, rel=0.2)
    assert width["together"] == pytest.approx(2 * 1.96 * 0.5 / 100**0.5, rel=0.2)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(300):
        per_scene = rng.beta(8, 2, size=60)  # true share 0.8, scenes differ
        correct = [rng.random(rng.integers(0, 9)) < share for share in per_scene]
        interval = bootstrap_interval(correct, seed=seed, resamples=400)
        hits += interval.low <= 0.8 <= interval.high
    assert 0.90 <= hits / 300 <= 0.98


def test_a_scene_weighs_as_much_as_it_has_questions():
    ragged = [[True] * 9, [False], []]
    assert bootstrap_interval(ragged, seed=0).mean == pytest.approx(0.9)
    assert bootstrap_interval(ragged, seed=0)[1:] == (0.0, 1.0)
    interval = bootstrap_interval(ragged * 50, seed=0)
    assert 0.8 < interval.low < 0.9 < interval.high < 1.0


def test_an_interval_over_no_question_is_refused():
    with pytest.raises(ValueError, match="no question to average over"):
        bootstrap_interval([[], []], seed=0)


def test_recall_counts_own_keys_among_the_k_most_similar():
    queries = np.eye(4)
    keys = np.eye(4)[[1, 0, 2, 3]]
    assert recall_at_k(queries, keys, 1) == 0.5
    # Row 0: its own key has similarity 0, like two others; only k = 4 is sure to hold it.
    assert recall_at_k(queries, keys, 3) == 0.5
    assert recall_at_k(queries, keys, 4) == 1.0


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_collapsed_or_broken_embeddings_retrieve_nothing(value):
    rounding = np.random.default_rng(0).normal(0, 1e-7, (20, 3))
    assert recall_at_k(value + rounding, value + rounding, 5) == 0.0


def test_both_directions_are_reported():
    text = np.array([[1.0, 0.0], [0.8, 0.6]])
    image = np.array([[1.0, 0.0], [0.96, 0.28]])
    # Image 1 is nearest to text 1 (0.936 against 0.8), text 1's rival for image 1 is text 0 (0.96).
    metrics = retrieval_metrics(text, image)
    assert metrics["text_to_image"] == {"recall@1": 1.0, "recall@5": 1.0}
    assert metrics["image_to_text"] == {"recall@1": 0.5, "recall@5": 1.0}
    assert metrics["n"] == 2


FIGURES = {"accuracy": 0.9876, "low": 0.98, "high": 0.99, "n": 2000}
METRICS = {
    "step": 1500,
    "views": {
        "image": {"non_relational": FIGURES, "relational": FIGURES},
        "split_image_text": {"needs_both": FIGURES, "needs_both_image_only": FIGURES},
    },
    "retrieval": retrieval_metrics(np.eye(3), np.eye(3)),
}


def test_the_table_shows_every_figure_in_plain_text():
    out = io.StringIO()
    print_metrics(METRICS, file=out)
    text = out.getvalue()
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert text.isascii()
    assert "image non-relational 98.8% 98.0% to 99.0% 2,000" in rows
    assert "split_image_text needs both 98.8% 98.0% to 99.0% 2,000" in rows
    assert "image only 98.8% 98.0% to 99.0% 2,000" in rows
    assert "text to image 100.0% 100.0%" in rows
    print_metrics({**METRICS, "retrieval": None}, file=out)


def test_kinds_and_answers_of_users_are_never_read_as_markup():
    kinds = ["[red]x", "[/]", ":smile:", "a_b", "x" * 5_000]
    views = {"all": {kind: {**FIGURES, "baseline": 0.5} for kind in kinds}}
    out = io.StringIO()
    print_metrics({"step": 1, "views": views, "baseline_answer": "[/b]"}, file=out)
    text = out.getvalue()
    assert all(kind in text for kind in kinds[:-1]) and "x" * 61 not in text
    assert 'answering "[/b]"' in text


def test_metrics_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "eval" / "metrics.json"
    write_metrics(path, METRICS)
    assert json.loads(path.read_text()) == METRICS
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_metrics(path, {"step": float("nan")})
    assert json.loads(path.read_text()) == METRICS
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_likelihood_agrees_with_what_is_generated(small_run):
    opened = open_checkpoint(small_run)
    batches, split = list(opened.batches("aux")), split_model(opened.loaded.model)
    found = answer_likelihood(*split, batches)
    longest = opened.max_new_tokens
    given = {"aux": batches}
    results = evaluate(*split, given, opened.loaded.tokenizer, step=1, max_new_tokens=longest)
    right = np.reshape([answer.correct for answer in results.answers], found.right.shape)
    logprobs = np.reshape([answer.logprob for answer in results.answers], found.right.shape)
    np.testing.assert_array_equal(found.right, right)
    assert 0 < right.sum() < right.size
    np.testing.assert_allclose(found.nats[right], -logprobs[right], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.confidence[right], np.exp(logprobs[right]), rtol=1e-3)
    assert (found.nats >= -np.log(found.confidence) - 1e-4).all()
    tokens = sum(int(each.batch.answer_mask[: each.valid].sum()) for each in batches)
    assert results.losses == {"aux": pytest.approx(float(found.nats.sum()) / tokens, rel=1e-4)}
