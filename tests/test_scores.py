"""Metrics equal their reference implementations, and intervals are over scenes."""

import io
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu

from slam_jax.data import DataConfig
from slam_jax.data.rows import Row, Rows
from slam_jax.errors import ConfigError, InputError
from slam_jax.evaluation import (
    METRICS,
    Answer,
    print_metrics,
    read_answers,
    score_answers,
    write_answers,
)
from slam_jax.evaluation import metrics as intervals
from slam_jax.evaluation.answers import summarise
from slam_jax.evaluation.by_answer import figures_by_answer, untested_answers
from slam_jax.evaluation.cider import cider, tokenise
from slam_jax.evaluation.metrics import resample_scenes
from slam_jax.evaluation.texts import (
    absolute_error,
    anls,
    as_number,
    edit_distance,
    token_f1,
    within_tolerance,
)
from slam_jax.evaluation.translations import bleu, bleu_counts, chrf, chrf_counts
from slam_jax.evaluation.vqa import normalise, vqa_accuracy
from slam_jax.slam_v3 import SlamV3Config
from slam_jax.training.experiment import RunConfig

GOLDENS = Path(__file__).parent / "goldens" / "metrics"
PAIRS = json.loads((GOLDENS / "pairs.json").read_text(encoding="utf-8"))
SCORES = json.loads((GOLDENS / "scores.json").read_text(encoding="utf-8"))


def answer(predicted, *references, scene=0, view="text", kind="all", prompt="?", **more):
    expected = references[0]
    return Answer(view, scene, kind, False, prompt, expected, predicted, -1.0, references, **more)


def golden(part):
    return [answer(p["predicted"], *p["references"], scene=i) for i, p in enumerate(PAIRS[part])]


@pytest.mark.parametrize(
    ("part", "name"), [(part, name) for part, scores in SCORES.items() for name in scores]
)
def test_a_metric_equals_its_reference_implementation_on_200_pairs(part, name):
    counts, expected = METRICS[name].counts(golden(part)), SCORES[part][name]
    assert len(counts) == 200 and (counts[:, 0] == 1).all()
    if isinstance(expected, list):
        np.testing.assert_allclose(counts[:, 1], expected, rtol=0, atol=1e-12)
        expected = np.mean(expected)
    found: Any = score_answers(golden(part), [name], resamples=50)[name]
    assert found.score == pytest.approx(expected, abs=1e-9) and found.n == 200
    assert found.low < found.score < found.high


def test_counts_of_a_corpus_add_up():
    """A scene that is drawn twice counts as one that is there twice."""
    pairs = [(a.predicted, a.accepted) for a in golden("captions")[:40]]
    twice = [*pairs, *pairs[:15]]
    for counts, score in ((bleu_counts, bleu), (chrf_counts, chrf)):
        rows = counts(*zip(*pairs, strict=True))
        weighted = np.repeat([2.0, 1.0], [15, 25]) @ rows
        whole = counts(*zip(*twice, strict=True)).sum(axis=0)
        np.testing.assert_array_equal(weighted, whole)
        several = score(np.stack([whole, rows.sum(axis=0)]))
        assert several[0] == score(whole[None])[0] != several[1]


def test_bleu_and_chrf_of_few_words_are_smoothed_as_in_sacrebleu():
    scorers = sacrebleu.BLEU(), sacrebleu.CHRF()
    pairs = [(a.predicted, a.accepted) for part in SCORES for a in golden(part)[:60]]
    for scorer, counts, score in zip(
        scorers, (bleu_counts, chrf_counts), (bleu, chrf), strict=True
    ):
        found = score(counts(*zip(*pairs, strict=True)))  # each answer is a corpus
        expected = [
            scorer.corpus_score([x], [[each] for each in known]).score for x, known in pairs
        ]
        np.testing.assert_allclose(found, expected, atol=1e-9)
        assert len(set(expected)) > 20 and expected.count(0.0) > 3


@pytest.mark.parametrize("name", METRICS)
def test_right_and_empty_answers(name):
    texts = ("a red bus drives past", "two small dogs play ball", "二匹の猫 と 犬 が", "12 3 4 5")
    numbers = ("12", "1,000", "50%", "-3")
    references = numbers if METRICS[name].label.endswith(("5%", "error")) else texts
    right = [answer(each, *[each] * 10, scene=i) for i, each in enumerate(references)]
    empty = [each._replace(predicted="") for each in right]
    best = {"bleu": 100, "chrf": 100, "cider": 10, "absolute_error": 0}.get(name, 1)
    found = score_answers(right, [name])[name]
    assert found[:3] == pytest.approx((best,) * 3) and found.n == 4 and found.baseline is None
    worst = score_answers(empty, [name], baseline="12 3 4 5")[name]
    assert worst.score == (None if name == "absolute_error" else 0)
    alone = score_answers(right[:1], [name])[name]
    assert alone.low == alone.score == alone.high and alone.n == 1
    assert alone.score == pytest.approx(0 if name == "cider" else best)  # no n-gram is rare
    assert score_answers([], [name], baseline="x")[name] == (None, None, None, None, 0)


def test_the_baseline_is_the_score_of_the_same_answer_to_all_questions():
    answers = golden("captions")
    usual = [each._replace(predicted="A man sits near a ball.") for each in answers]
    names = ("exact_match", "bleu", "cider", "f1")
    found = score_answers(answers, names, baseline="A man sits near a ball.", resamples=0)
    for name, score in score_answers(usual, names, resamples=0).items():
        assert found[name].baseline == score.score != found[name].score
        assert score.low is score.high is None


def test_intervals_of_all_metrics_are_over_scenes():
    pairs = golden("captions")
    apart = [each._replace(scene=i) for i, each in enumerate(pairs * 4)]
    together = [each._replace(scene=i % 200) for i, each in enumerate(pairs * 4)]
    for name in ("bleu", "chrf", "f1"):
        narrow, wide = (width(score_answers(each, [name])[name]) for each in (apart, together))
        assert wide == pytest.approx(2 * narrow, rel=0.15)


def width(score: Any) -> float:
    return score.high - score.low


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    sums = [np.random.default_rng(0).random((30, 2)), np.arange(30.0)[:, None]]
    at_once = resample_scenes(sums, seed=3, resamples=50)
    assert [x.shape for x in at_once] == [(50, 2), (50, 1)]
    assert not np.array_equal(at_once[1], resample_scenes(sums, seed=4, resamples=50)[1])
    monkeypatch.setattr(intervals, "_LARGEST_BLOCK", 100)
    for one, other in zip(at_once, resample_scenes(sums, seed=3, resamples=50), strict=True):
        np.testing.assert_allclose(one, other)


def test_a_metric_that_is_unknown_or_lacks_its_package_is_refused_in_a_line(monkeypatch):
    with pytest.raises(ConfigError, match="run.metrics has no metric 'blue'; did you mean 'bleu'"):
        score_answers(golden("short"), ["blue"])
    with pytest.raises(ConfigError, match="run.metrics has no metric"):
        RunConfig(metrics=("accuracy",))
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert RunConfig(metrics=("chrf",)).metrics == ("chrf",)  # such a checkpoint loads
    with pytest.raises(InputError, match=r"need sacrebleu; .* pip install 'slam_jax\[metrics\]'"):
        score_answers(golden("short"), ["chrf"])


def test_scores_of_one_call_are_those_of_several():
    answers = [answer(str(i), str(i // 2) if i % 3 else "x", scene=i) for i in range(60)]
    names = ("exact_match", "within_tolerance", "f1", "absolute_error")
    together = score_answers(answers, names, baseline="3")
    assert [together[name].n for name in names] == [60, 40, 60, 40]
    for name in names:
        assert together[name] == pytest.approx(score_answers(answers, [name], baseline="3")[name])


# Single metrics, by hand.


def test_vqa_accuracy_leaves_one_person_out_at_a_time():
    people = ["yes"] * 3 + ["no"] * 7
    assert vqa_accuracy("Yes.", people) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("no", people) == 1 and vqa_accuracy("maybe", people) == 0
    assert vqa_accuracy("Two!", ["two", "2", "the 2", "2."] * 2) == 1
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0  # nothing is normalised where all agree
    assert normalise("Somebody'd couldnt've") == "somebodyd couldn't've"  # as in the source
    assert normalise("The dogs dont eat 1,000 apples.") == "dogs don't eat 1000 apples"
    with pytest.raises(ValueError, match="at least one reference"):
        vqa_accuracy("yes", [])


def test_vqa_accuracy_says_nothing_about_fewer_than_four_answers():
    answers = [answer("yes", *["yes"] * 3), answer("yes", *["yes"] * 4, scene=1)]
    assert score_answers(answers, ["vqa_accuracy"])["vqa_accuracy"][::4] == (1.0, 1)


def test_the_edit_distance_is_that_of_the_table():
    def table(a, b):
        row = list(range(len(a) + 1))
        for j, letter in enumerate(b, 1):
            last, row = row, [j]
            for i, own in enumerate(a, 1):
                row.append(min(row[-1] + 1, last[i] + 1, last[i - 1] + (own != letter)))
        return row[-1]

    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("abé猫", k=rng.randint(0, 90))) for _ in range(2))
        assert edit_distance(a, b) == table(a, b) == edit_distance(b, a)


def test_anls_is_0_from_half_of_the_letters_on():
    assert anls("Coca  cola", ["Coca Cola", "Coca Cola Company"]) == 1
    assert anls("cocacola", ["Coca Cola"]) == pytest.approx(8 / 9)
    assert anls("abxx", ["abcd"]) == 0 and anls("abcx", ["abcd"]) == 0.75
    assert anls("", [""]) == 1 and anls("", ["a"]) == 0


def test_f1_of_words():
    assert token_f1("the red, RED bus", ["a red bus"]) == pytest.approx(0.8)
    assert token_f1("The", ["a"]) == 1 and token_f1("", ["bus"]) == token_f1("bus", ["the"]) == 0


def test_numbers_are_read_as_people_write_them():
    known = {"12": 12, " -2.5 ": -2.5, "1,500.5": 1500.5, "1e3": 1000, ".5": 0.5, "12 %": 0.12}
    assert {text: as_number(text) for text in known} == pytest.approx(known)
    for text in ("", "1_1", "1,5", "12,34", "two", "nan", "inf", "1e999", "1 2", "٣", "--1", "%"):
        assert as_number(text) is None
    assert absolute_error("10", ["7", "12", "x"]) == 2
    assert absolute_error("x", ["7"]) is absolute_error("7", ["x"]) is None
    assert within_tolerance("105", ["100"]) == 1 and within_tolerance("105.1", ["100"]) == 0
    assert within_tolerance("-95", ["-100"]) == within_tolerance("0", ["0"]) == 1
    assert within_tolerance("x", ["7"]) == 0 and within_tolerance("7", ["x"]) is None


def test_cider_of_hand_made_captions():
    captions = [["a b c d e"], ["v w x y z"]]
    np.testing.assert_allclose(cider(["a b c d e", "q"], captions), [10, 0])
    shorter, _ = cider(["a b c d", "q"], captions)  # cosines, and the penalty of one 2-gram less
    same = sum(np.sqrt(shared / whole) for shared, whole in ((4, 5), (3, 4), (2, 3), (1, 2)))
    assert shorter == pytest.approx(10 * same / 4 * math.exp(-1 / 72))
    assert tokenise("A dog's Ball, (red)!") == "a dog's ball red"


# Several right answers, answers by what is expected, and the file of them.


def test_all_right_answers_of_a_row_are_references():
    row = Row(None, "text", None, "?", ("cat", "a cat", "cat"), where="data.csv, row 7")
    config = SlamV3Config.preset("tiny", 300)
    rows = Rows([row], "test", DataConfig(), config, streams=("text",))
    shown = rows.render(rows[0], "text", np.random.default_rng(0))
    assert shown.references == (("cat", "a cat", "cat"),) and shown.place == "data.csv, row 7"
    assert shown.answers[0] in shown.references[0]
    assert answer(" a cat", "cat", "a cat", "cat").correct
    assert not answer("dog", "cat", "a cat").correct
    assert answer("dog", "a cat", " cat", "cat").usual == "cat"
    alone = answer("cat", "cat")._replace(references=())
    assert alone.accepted == ("cat",) and alone.correct


def test_figures_by_answer_show_what_a_share_hides():
    said = ["yes"] * 19 + ["yes", "maybe", "yes "]
    answers = [
        answer(text, "yes" if i < 19 else "no", scene=i, view="image" if i % 2 else "text")
        for i, text in enumerate(said)
    ]
    half = answer("no", "no", view="split_image_text_only_image")
    figures = figures_by_answer([*answers, half], baseline="yes")
    yes, no = figures["pooled"]["answers"]
    assert (yes["answer"], yes["n"], yes["accuracy"], yes["baseline"]) == ("yes", 19, 1, 1)
    assert yes["instead"] == [] and yes["low"] == yes["high"] == 1
    assert (no["answer"], no["n"], no["accuracy"], no["baseline"]) == ("no", 3, 0, 0)
    assert no["instead"] == [{"answer": "yes", "n": 2}, {"answer": "maybe", "n": 1}]
    assert list(figures["views"]) == ["text", "image"] and figures["pooled"]["others"] is None
    metrics = {"step": 1, "views": summarise(answers), "answers": figures}
    metrics["untested_answers"] = untested_answers(["yes"] * 95 + ["[no]"] * 5, answers)
    assert metrics["untested_answers"] == [{"answer": "[no]", "share": 0.05}]
    out = io.StringIO()
    print_metrics(metrics, file=out)
    assert "no                 0.0%      0.0% to 0.0%   3  yes (2), maybe (1)" in out.getvalue()
    assert 'expects these answers of the training split: "[no]" (5.0%)' in out.getvalue()


def test_of_many_answers_the_frequent_ones_are_named():
    answers = [answer("x", str(i // 2), scene=i) for i in range(90)]
    pooled = figures_by_answer([*answers, answer("0", "0")])["pooled"]
    assert len(pooled["answers"]) == 30 and pooled["answers"][0]["n"] == 3
    assert pooled["others"] == {"answers": 15, "n": 30, "accuracy": 0.0, "low": 0.0, "high": 0.0}
    assert untested_answers([], answers) == []


def test_chosen_metrics_are_in_the_metrics_and_the_table_and_nothing_else_changes():
    answers = golden("captions")
    plain, more = (summarise(answers, 0, "x", names) for names in ((), ("exact_match", "bleu")))
    assert plain["text"]["all"].keys() == {"accuracy", "low", "high", "n", "baseline"}
    scores = more["text"]["all"].pop("scores")
    assert more == plain and scores.keys() == {"bleu"}
    assert scores["bleu"]["score"] == pytest.approx(SCORES["captions"]["bleu"])
    more["text"]["all"]["scores"] = json.loads(json.dumps(scores, allow_nan=False))
    out = io.StringIO()
    print_metrics({"step": 1, "views": more}, file=out)
    assert "BLEU" in out.getvalue() and "57.04" in out.getvalue()


def test_answers_survive_their_file(tmp_path):
    answers = [
        answer("naïve\n猫", "猫", " x ", place="data.csv, row 3"),
        answer("", "a", scene=2)._replace(needs_both=True, logprob=-0.125),
    ]
    path = tmp_path / "eval" / "answers.jsonl"
    write_answers(path, [*answers, answers[0]._replace(logprob=-math.inf, references=())])
    *found, last = read_answers(path)
    assert found == answers and math.isnan(last.logprob) and last.accepted == ("猫",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[]", "line 2: no object"),
        ('{"view": 3}', "line 2: view is 3; expected a line that slam-eval wrote"),
        (None, "line 2: scene is True"),
        ("\udcff", "codec can't decode"),
    ],
)
def test_a_file_of_something_else_is_refused_with_its_line(tmp_path, line, message):
    path = tmp_path / "answers.jsonl"
    write_answers(path, [answer("x", "y")])
    first = path.read_text()
    line = first.replace('"scene": 0', '"scene": true') if line is None else line
    path.write_bytes((first + line).encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=message):
        read_answers(path)
    path.write_text("")
    with pytest.raises(InputError, match="it has no answer"):
        read_answers(path)
