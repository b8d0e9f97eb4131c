"""Two models are compared on the same questions, and only on those."""

import io
import json
import os
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from slam_jax.errors import ConfigError, InputError
from slam_jax.evaluation import Answer, write_answers, write_metrics
from slam_jax.reporting.compare import sides as sides_module
from slam_jax.reporting.compare.output import print_comparison, write_comparison
from slam_jax.reporting.compare.paired import ALL_VIEWS, compare_answers, pair_answers
from slam_jax.reporting.compare.sides import Side, read_sides

NAMES = ("exact_match", "f1", "bleu", "cider")
TEXTS = [f"a {colour} bus drives {i}" for i, colour in enumerate(("red", "blue", "old") * 20)]
EVIL = '</td><script>alert("x")</script>'


def answers(predicted, *, views=("text",), per_scene=1) -> list[Answer]:
    """One for each of TEXTS and view."""
    return [
        Answer(view, i // per_scene, f"k{i % 2}", False, f"?{i}", text, said, -1.0, (text, "x"))
        for view in views
        for i, (text, said) in enumerate(zip(TEXTS, predicted, strict=True))
    ]


def compare(a, b, **settings) -> dict[str, Any]:
    return compare_answers(pair_answers(a, b), settings.pop("names", NAMES), **settings)


def cells(found):
    return [row for kinds in found["views"].values() for each in kinds.values() for row in
            each.values()]  # fmt: skip


WRONG_AT = {3, 4, 11, 12, 30, 31, 32, 50}
SAID = [text if i not in WRONG_AT else "a red car" for i, text in enumerate(TEXTS)]
OTHER = [text if i % 4 else "the red bus stops" for i, text in enumerate(TEXTS)]


def test_equal_answers_give_differences_and_intervals_of_exactly_0():
    found = compare(answers(SAID, per_scene=3), answers(SAID, per_scene=3))
    for row in cells(found):
        assert (row["difference"], row["low"], row["high"]) == (0, 0, 0) and row["a"] == row["b"]
    assert {row["p"] for row in cells(found) if "p" in row} == {1.0}
    assert [group["n"] for group in found["rows"].values()] == [0, 0, 0]


def test_a_known_difference_is_found_with_mcnemars_p():
    found = compare(answers(SAID), answers(OTHER))
    whole = found["views"][ALL_VIEWS]["all questions"]["exact_match"]
    right = [(i not in WRONG_AT, i % 4 > 0) for i in range(60)]
    gained, lost = right.count((False, True)), right.count((True, False))
    assert (whole["a"], whole["b"], whole["n"]) == (52 / 60, 45 / 60, 60)
    assert whole["difference"] == pytest.approx((gained - lost) / 60)
    assert whole["low"] < whole["difference"] < whole["high"]
    assert whole["p"] == pytest.approx(2 * binom.cdf(min(gained, lost), gained + lost, 0.5))
    rows = found["rows"]
    assert (rows["gained"]["n"], rows["lost"]["n"]) == (gained, lost)
    assert rows["other"]["n"] == right.count((False, False)) > 0
    first = rows["gained"]["rows"][0]
    assert (first["prompt"], first["a"], first["b"]) == ("?3", "a red car", TEXTS[3])
    assert first["references"] == [TEXTS[3], "x"]
    kinds = found["views"]["text"]
    assert {kind: row["exact_match"]["n"] for kind, row in kinds.items()} == {"k0": 30, "k1": 30}


def test_swapped_sides_negate_everything():
    one, other = (answers(said, per_scene=2, views=("text", "image")) for said in (SAID, OTHER))
    forth, back = compare(one, other), compare(other, one)
    assert len(cells(forth)) == len(NAMES) * 5
    for a, b in zip(cells(forth), cells(back), strict=True):
        assert (a["a"], a["b"], a["difference"]) == (b["b"], b["a"], -b["difference"])
        assert (a["low"], a["high"]) == (pytest.approx(-b["high"]), pytest.approx(-b["low"]))
        assert a.get("p") == b.get("p")
    assert forth["rows"]["gained"]["n"] == back["rows"]["lost"]["n"] > 0


def test_pairing_narrows_the_interval():
    """Both fail at the same hard scenes, so the difference is known better than each score."""
    rng = np.random.default_rng(0)
    hard = rng.random(60) < 0.5
    said = ["no" if x else text for x, text in zip(hard, TEXTS, strict=True)]
    better = [text if i == 5 else x for i, (x, text) in enumerate(zip(said, TEXTS, strict=True))]
    found = compare(answers(said), answers(better), names=("exact_match",))
    row = found["views"][ALL_VIEWS]["all questions"]["exact_match"]
    assert row["difference"] == pytest.approx(hard[5] / 60) and row["high"] - row["low"] < 0.06


def test_questions_of_one_scene_are_one_example_of_the_sign_test():
    same = [text if i < 30 else "no" for i, text in enumerate(TEXTS)]
    found = compare(answers(["no"] * 60, per_scene=10), answers(same, per_scene=10))
    row = found["views"][ALL_VIEWS]["all questions"]["exact_match"]
    assert row["p"] == pytest.approx(2 * 0.5**3)  # three scenes of ten questions are better


def test_a_metric_compares_only_answers_that_count_for_both():
    one = answers(["3"] * 60)
    one = [x._replace(expected="4", references=("4",)) for x in one]
    other = [x._replace(predicted="6" if i < 10 else "six") for i, x in enumerate(one)]
    found = compare(one, other, names=("absolute_error", "vqa_accuracy"))
    row = found["views"][ALL_VIEWS]["all questions"]
    assert (row["absolute_error"]["difference"], row["absolute_error"]["n"]) == (1, 10)
    nothing = dict.fromkeys(("a", "b", "difference", "low", "high"))
    assert row["vqa_accuracy"] == {**nothing, "n": 0}
    with pytest.raises(ConfigError, match="no metric 'x'"):
        compare(one, other, names=("x",))


def test_rows_that_differ_are_refused_and_named():
    one = answers(SAID, views=("text", "image"))
    shared = pair_answers(one, answers(SAID))
    assert {a.view for a, _ in shared} == {"text"} and len(shared) == 60
    changed = [x._replace(prompt="what?") if x.scene == 7 else x for x in one]
    for other, message in (
        (one[:-1], "rows differ: view image has 60 and 59 questions; compare two"),
        (changed, r"view text, '\?7' -> 'a blue bus drives 7' of 7 and 'what\?' -> "),
        ([x._replace(references=("y",)) for x in one], "rows differ: view text, '\\?0'"),
        ([x._replace(view="aux") for x in one], "no view is in both: image, text and aux; "),
    ):
        with pytest.raises(InputError, match=message) as caught:
            pair_answers(one, other)
        assert "\n" not in str(caught.value) and "--config.data.path" in str(caught.value)
    reordered = [x._replace(references=("x", x.expected)) for x in reversed(one)]
    assert len(pair_answers(one, reordered)) == 120


def test_rows_about_one_picture_are_paired_by_their_own_number():
    """A file of version 0.27 numbers the records alone."""
    grouped = [x._replace(scene=x.scene % 5, record=x.scene) for x in answers(SAID)]
    pairs = pair_answers(grouped, [*reversed(grouped)])
    assert [(a.record, b.record) for a, b in pairs] == [(i, i) for i in range(60)]
    assert len(pair_answers(answers(SAID), grouped)) == 60


def test_the_table_and_the_page_show_the_figures_and_escape_text_of_users(tmp_path):
    views = ("text", "text_only_x")
    one, other = answers([EVIL, *SAID[1:]], views=views), answers(OTHER, views=views)
    found = compare(one, other)
    both = tuple(Side(f"runs/{EVIL}", 3, x, {"name": "t"}, None) for x in (one, other))
    out = io.StringIO()
    print_comparison(found, (both[0], both[1]), file=out)
    text = out.getvalue()
    assert "exact match" in text and "-10.0" in text and "step 3, on t" in text
    assert "only B is right: 5 questions" in text
    path = write_comparison(tmp_path / "new", found, (both[0], both[1]))
    page = path.read_text()
    assert EVIL not in page and page.count("&lt;/td&gt;&lt;script&gt;") >= 3
    assert "<svg" in page and "B - A, percentage points" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    stored = json.loads((tmp_path / "new" / "compare.json").read_text())
    assert stored["views"] == found["views"] and stored["b"]["step"] == 3


# Where the answers are from.


DATA = {"name": "folder", "path": "/t.jsonl", "sha256": "abc", "rows": {"test": 60}}


def write_folder(folder, said=SAID, step=3, **data):
    write_answers(folder / "answers.jsonl", answers(said))
    identity = {**DATA, **data}
    write_metrics(
        folder / "metrics.json",
        {"step": step, "data": identity, "data_config": {"path": identity["path"]}},
    )
    return folder


@pytest.fixture
def evaluations(monkeypatch):
    """The calls of `evaluate_checkpoint`, which answers as OTHER."""
    calls = []

    def evaluated(path, step, overrides, *, base, data_config):
        calls.append((str(path), step, list(overrides), data_config))
        metrics = {"step": 9, "data": DATA, "data_config": data_config or {"path": "own"}}
        return SimpleNamespace(metrics=metrics, answers=answers(OTHER))

    monkeypatch.setattr(sides_module, "evaluate_checkpoint", evaluated)
    return calls


def test_two_folders_of_answers_need_no_model(tmp_path, evaluations):
    one, other = write_folder(tmp_path / "a"), write_folder(tmp_path / "b", OTHER, path="/copy")
    a, b = read_sides([one, other])
    assert not evaluations and (a.step, b.path) == (3, str(other))
    assert [x.predicted for x in b.answers] == OTHER
    elsewhere = write_folder(tmp_path / "c", sha256="def")
    with pytest.raises(InputError, match="answers to other data; give the workdirs of their runs"):
        read_sides([one, elsewhere])
    with pytest.raises(InputError, match="--config needs a model on one side"):
        read_sides([one, other], overrides=["--config.data.path=x"])
    built_in = write_folder(tmp_path / "d", sha256=None)
    with pytest.raises(InputError, match="other data"):
        read_sides([built_in, write_folder(tmp_path / "e", sha256=None, name="digits")])
    (one / "metrics.json").write_text("[1]")
    with pytest.raises(InputError, match=r"metrics\.json: expected what slam-eval wrote"):
        read_sides([one, other])


def test_a_model_answers_the_questions_of_the_other_side(tmp_path, evaluations):
    stored, run, second = write_folder(tmp_path / "a"), tmp_path / "run", tmp_path / "second"
    for order in ([stored, run], [run, stored]):
        both = read_sides(order, ("latest", "latest"))
        assert [side.step for side in both] == [9 if side is run else 3 for side in order]
    assert evaluations == [(str(run), "latest", [], {"path": "/t.jsonl"})] * 2
    evaluations.clear()
    change = ["--config.data.path=x"]
    read_sides([run, second], overrides=change)
    own = {"path": "own"}
    assert evaluations == [(str(run), None, change, None), (str(second), None, change, own)]
    (stored / "metrics.json").unlink()
    with pytest.raises(InputError, match="does not say of which data .* evaluate it again"):
        read_sides([stored, run])


@pytest.mark.release
def test_stored_answers_of_a_workdir_are_used_only_for_their_checkpoint(
    small_run, tmp_path, evaluations
):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    best = sides_module.Checkpoints(run).resolve()
    other = write_folder(tmp_path / "other", OTHER)
    write_folder(run / "eval", step=best)
    a, b = read_sides([run, other])
    assert not evaluations and a.step == best and b.step == 3
    read_sides([run, other], ("latest" if best != 24 else 16, None))
    assert len(evaluations) == 1
    os.utime(run / "eval" / "answers.jsonl", (1, 1))  # the run has saved this step again
    assert read_sides([run, other])[0].step == 9 and len(evaluations) == 2


def test_a_language_model_is_refused(tmp_path, evaluations):
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="is a language model; give the workdir of a run"):
        read_sides([folder, folder])


@pytest.mark.slow
def test_a_run_compared_with_itself_is_the_same(small_run):
    a, b = read_sides([small_run, small_run])
    assert len(a.answers) > 100
    found = compare(a.answers, b.answers)
    assert {(row["difference"], row["low"], row["high"]) for row in cells(found)} == {(0, 0, 0)}
