"""The held-out comparison: its text, its budgets, what a run measures, its tasks."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from slam_jax.data.records import DataError
from slam_jax.errors import ConfigError, InputError
from slam_jax.language_models import measure
from slam_jax.language_models.flops import training_flops
from slam_jax.rocket.engine import run
from slam_jax.rocket.heldout import measure as heldout
from slam_jax.rocket.heldout.budgets import fit
from slam_jax.rocket.heldout.corpus import (
    load_corpus,
    make_corpus,
    read_documents,
    save_corpus,
    split_documents,
    training_rows,
)
from slam_jax.rocket.heldout.protocol import Heldout
from slam_jax.rocket.heldout.settings import HeldoutSettings
from slam_jax.rocket.protocols import DEFAULT_MODELS
from slam_jax.rocket.sweep import validation_losses
from tests.helpers import document, schema_errors, write_texts

pytestmark = pytest.mark.release


def quiet(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = write_texts(tmp_path_factory.mktemp("texts"))
    (root / "inner").mkdir()
    for i in range(1, 120, 2):
        (root / f"{i}.txt").rename(root / "inner" / f"{i}.txt")
    (root / "copy.txt").write_text(document(3))
    (root / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (root / ".hidden").write_text("not to be read")
    (root / "empty.txt").write_text("  \n")
    return root


@pytest.fixture(scope="module")
def settings(folder) -> HeldoutSettings:
    return HeldoutSettings(
        text=str(folder),
        vocab_size=300,
        budget=3e5,
        length=16,
        batch_size=4,
        num_tokens=2_560,
        sweep_tokens=640,
        learning_rates=(1e-3, 4e-3),
        more_learning_rates=1,
        seeds=(0, 1),
        document_tokens=40,
        curve_points=2,
        prompt_length=8,
        new_tokens=4,
        rounds=2,
        repeats=2,
    )


@pytest.fixture(scope="module")
def corpus(settings, tmp_path_factory):
    corpus = make_corpus(settings.text, settings.vocab_size)
    where = tmp_path_factory.mktemp("corpus") / "corpus"
    save_corpus(corpus, where)
    return corpus, where


# The text.


def test_documents_are_the_texts_of_a_folder(folder):
    documents = read_documents(str(folder))
    # 120, a copy and the empty file; neither the hidden file nor the picture.
    assert len(documents) == 122 and set(documents) == {*map(document, range(120)), "  \n"}


def test_a_split_depends_on_the_document_alone():
    documents = [document(i) for i in range(120)]
    splits = split_documents(documents)
    assert sorted(text for texts in splits.values() for text in texts) == sorted(documents)
    assert {name: len(texts) for name, texts in splits.items()} == {
        "train": 108,
        "validation": 3,
        "test": 9,
    }
    # Fewer documents, in another order, some twice: each keeps its split and its place.
    fewer = split_documents([*reversed(documents[20:]), *documents[40:60], " "])
    for name, texts in fewer.items():
        assert texts == [text for text in splits[name] if text in set(documents[20:])]


def test_too_few_documents_are_an_error():
    with pytest.raises(DataError, match="8 documents, of which .* are for .*; at least 3"):
        split_documents(map(document, range(8)))
    with pytest.raises(DataError, match="give 'stdlib', tfds:NAME or a folder of files"):
        read_documents("/no/such/folder")


def test_the_standard_library_is_read_without_tests_and_tables():
    documents = read_documents("stdlib")
    assert len(documents) > 300
    joined = "\n".join(documents)
    assert "class JSONDecoder" in joined and "class TestCase" in joined
    for absent in ("class TestJSONDecoder", "Python Character Mapping Codec cp1252", "slam_jax"):
        assert absent not in joined


def test_a_library_may_be_in_a_folder_named_test(tmp_path, monkeypatch):
    root = tmp_path / "test" / "lib"
    (root / "tests").mkdir(parents=True)
    (root / "a.py").write_text("text")
    (root / "tests" / "b.py").write_text("test")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
    assert read_documents("stdlib") == ["text"]


class Proverbs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS set of texts."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"title": tfds.features.Text(), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(5):
            yield i, {"title": f"number {i}", "text": document(i)}


def test_documents_are_the_texts_of_a_tfds_set(tmp_path, monkeypatch):
    monkeypatch.setenv("SLAM_JAX_DATA_DIR", str(tmp_path))
    Proverbs(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    assert sorted(read_documents("tfds:proverbs")) == sorted(map(document, range(5)))


def test_a_corpus_is_stored_and_decodes_to_its_text(corpus, settings):
    made, where = corpus
    loaded = load_corpus(where)
    for name, array in made.arrays.items():
        np.testing.assert_array_equal(loaded.arrays[name], array)
    assert loaded.about == made.about and loaded.about["test"]["documents"] == 9
    assert make_corpus(settings.text, settings.vocab_size).about == made.about
    splits = split_documents(read_documents(settings.text))
    whole = list(loaded.documents("test", 10_000))
    assert [loaded.tokenizer.decode(each[1:]) for each in whole] == splits["test"]
    assert all(each[0] == loaded.tokenizer.bos_id for each in whole)
    assert all(each[-1] == loaded.tokenizer.eos_id for each in whole)
    for cut, each in zip(loaded.documents("test", 7), whole, strict=True):
        np.testing.assert_array_equal(cut, each[:8])
    assert sum(map(len, whole)) == loaded.about["test"]["tokens"]
    (where / "about.json").write_text("{")
    with pytest.raises(InputError, match="not a corpus"):
        load_corpus(where)
    save_corpus(made, where)


def test_rows_are_the_whole_text_once_per_epoch():
    def rows(step: int, seed: int = 0):
        return training_rows(np.arange(100, dtype=np.int32), 7, seed, step, 2)

    seen = np.concatenate([rows(step) for step in range(7)])  # 14 rows are an epoch
    assert seen.shape == (14, 8)
    np.testing.assert_array_equal(np.sort(seen[:, 1:].ravel()), np.arange(1, 99))
    np.testing.assert_array_equal(seen[:, 1:], seen[:, :-1] + 1)
    again = np.concatenate([rows(step) for step in range(7, 14)])
    assert not np.array_equal(again, seen)
    np.testing.assert_array_equal(np.sort(again.ravel()), np.sort(seen.ravel()))
    np.testing.assert_array_equal(rows(9), rows(9))
    assert not np.array_equal(rows(0, seed=1), rows(0))
    with pytest.raises(InputError, match="rows of 7 need more"):
        training_rows(np.arange(7, dtype=np.int32), 7, 0, 0, 2)


# The budgets.


# Counting parameters builds the model's shapes, which is slow; operations are a formula.
@pytest.mark.parametrize("name", DEFAULT_MODELS)
def test_every_system_meets_a_budget_of_flops(name):
    config = fit(name, "flops", 3e7, 256, 2_048)
    assert training_flops(config, 256) / 256 == pytest.approx(3e7, rel=0.02)
    assert config.vocab_size == 2_048 and config.embed_dim == 32 * config.num_heads


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "moe" else pytest.mark.slow) for n in DEFAULT_MODELS]
)
def test_every_system_meets_a_budget_of_parameters(name):
    size = measure(fit(name, "parameters", 4e6, 256, 2_048))
    assert size.active - size.embedding == pytest.approx(4e6, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("amount", [5e6, pytest.param(5.5e6, marks=pytest.mark.slow)])
def test_a_system_with_half_of_an_mlp_meets_any_budget(amount):
    size = measure(fit("slam_v6", "parameters", amount, 128, 2_048))
    assert size.active - size.embedding == pytest.approx(amount, rel=0.02)


def test_proportions_are_near_those_of_the_preset_seed():
    config = fit("deepseek_v2", "flops", 3e7, 256, 2_048)
    assert config.expert_dim == pytest.approx(config.mlp_dim / 4, abs=1)
    assert config.kv_lora_rank == 128 * config.embed_dim // 512
    assert 2.0 < config.mlp_dim / config.embed_dim < 8.0  # 4 in the preset


def test_a_budget_that_no_width_meets_is_an_error():
    with pytest.raises(ConfigError, match="slam_v6 comes within 2% of it at no width"):
        fit("slam_v6", "flops", 1e5, 256, 2_048)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, "seeds is .*; expected some, all different"),
        ({"learning_rates": (1e-3, 1e-3)}, "learning_rates is .*; expected some, all different"),
        ({"learning_rates": (0.0,)}, "learning_rates is 0.0; expected a number above 0"),
        ({"num_tokens": 100}, "num_tokens is 100; expected at least 16,384"),
        ({"budget_of": "money"}, "budget_of is 'money'; expected one of"),
        ({"warmup": 1.0}, "warmup is 1.0; expected a share"),
        ({"more_learning_rates": -1}, "more_learning_rates is -1; expected at least 0"),
        ({"vocab_size": 0}, "vocab_size is 0; expected at least 1"),
    ],
)
def test_invalid_settings_are_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        HeldoutSettings(**changes)


# A run.


@pytest.fixture(scope="module")
def figures(settings, corpus) -> dict[str, Any]:
    return heldout.train("standard", settings, quiet, **_asked(corpus), test=True)


def _asked(corpus) -> dict[str, Any]:
    return {"corpus": str(corpus[1]), "learning_rate": 4e-3, "seed": 1, "num_tokens": 2_560}


def test_a_run_learns_and_returns_its_curve(figures, settings):
    first, last = figures["curve"]
    assert (first["step"], last["step"], last["tokens"]) == (20, 40, 2_560)
    assert last["validation_loss"] == figures["validation_loss"] < first["validation_loss"] < 5.6
    assert last["train_loss"] < first["train_loss"]
    config = settings.config_of("standard", 300)
    assert last["flops"] == 160 * training_flops(config, 16)
    assert figures["skipped_updates"] == 0 and 0 < figures["stability"] < 1
    json.dumps(figures, allow_nan=False)


def test_every_token_of_a_test_document_is_predicted_once(figures, corpus):
    made, _ = corpus
    test = figures["test"]
    documents = list(made.documents("test", 40))
    assert test["tokens"] == [len(each) - 1 for each in documents]
    texts = [made.tokenizer.decode(each[1:]) for each in documents]
    assert test["bytes"] == [len(text.encode()) for text in texts]
    mean = sum(test["nats"]) / sum(test["tokens"])
    assert abs(mean - figures["validation_loss"]) < 0.7
    for first, five, tokens in zip(test["top1"], test["top5"], test["tokens"], strict=True):
        assert 0 <= first <= five <= tokens and float(first).is_integer()
    assert sum(test["top1"]) < sum(test["top5"])


def test_the_score_of_a_document_is_that_of_its_tokens(settings):
    # A model whose nats are the number of each token.
    def predict(tokens):
        return np.stack([tokens[:, 1:], tokens[:, 1:] % 2, tokens[:, 1:] % 3 > 0], axis=1)

    documents = [np.arange(1, 40), np.array([1, 7]), np.arange(2, 19)]
    sizes = [b"ab"] * 50
    scores = heldout.score_documents(predict, documents, settings, sizes)
    assert scores["nats"] == [sum(range(2, 40)), 7, sum(range(3, 19))]
    assert scores["top1"] == [19, 1, 8]
    assert scores["tokens"] == [38, 1, 16] and scores["bytes"] == [76, 2, 32]


@pytest.mark.slow
def test_quality_is_reproducible_and_a_trial_of_a_learning_rate_has_no_test(
    figures, settings, corpus
):
    again = heldout.train("standard", settings, quiet, **_asked(corpus), test=False)
    (point,) = again["curve"]
    last = figures["curve"][-1]
    assert {**point, "train_loss": last["train_loss"]} == last  # one point averages all steps
    assert again["stability"] == figures["stability"] and again["test"] is None


def test_stability_is_1_if_the_loss_falls_evenly():
    assert heldout.stability([9.0, 0.0, 3.0, 2.5, 2.0, 1.5]) == 1.0
    assert heldout.stability([9.0, 0.0, 3.0, 2.0, 3.0]) == 0.5
    assert heldout.stability([1.0]) == 1.0


# The tasks.

WORST = "learning rate 0.016"


def test_learning_rates_are_tried_before_one_is_used(settings, tmp_path):
    comparison = Heldout(settings, ("standard",), tmp_path)
    tasks = comparison.tasks({})
    assert [task.label for task in tasks] == [
        "learning rate 0.001",
        "learning rate 0.004",
        "seed 0",
        "seed 1",
        "timing 1",
        "timing 2",
    ]
    assert [task.optional for task in tasks] == [True, True, False, False, False, False]

    def arguments(label: str, done: Any) -> Any:
        [task] = [t for t in comparison.tasks({"standard": done}) if t.label == label]
        return task.arguments

    tried = tasks[1].arguments
    assert (tried["learning_rate"], tried["seed"], tried["num_tokens"]) == (4e-3, 0, 640)
    done = {tasks[0].label: {"validation_loss": 4.0}, tasks[1].label: {"reason": "diverged"}}
    done["learning rate 0.00025"] = {"validation_loss": 4.1}
    used = arguments("seed 1", done)
    assert (used["learning_rate"], used["seed"], used["num_tokens"]) == (1e-3, 1, 2_560)
    assert used["test"] and not tried["test"]
    # While the best is the lowest or the highest tried, there is one more.
    del done["learning rate 0.00025"]
    done[tasks[1].label] = {"validation_loss": 3.9}
    more = comparison.tasks({"standard": done})
    assert [task.label for task in more][:4] == [*(t.label for t in tasks[:2]), WORST, "seed 0"]
    assert more[2].arguments["learning_rate"] == 0.016
    done[WORST] = {"validation_loss": 4.1}
    assert comparison.tasks({"standard": done}) == more
    assert arguments("seed 0", done)["learning_rate"] == 4e-3
    done |= {tasks[1].label: {"validation_loss": 4.1}, "learning rate 0.00025": {}}
    assert list(validation_losses(done, settings)) == [1e-3, 4e-3, 0.00025]
    for label in (tasks[0].label, tasks[1].label):
        done[label] = {"reason": "took more than 3 s"}
    [task] = [t for t in comparison.tasks({"standard": done}) if t.label == "seed 0"]
    assert task.impossible == "no learning rate could be tried: took more than 3 s"


def test_a_stored_corpus_of_other_settings_is_an_error(settings, tmp_path):
    Heldout(settings, ("standard",), tmp_path)
    other = dataclasses.replace(settings, vocab_size=320)
    with pytest.raises(InputError, match="320.* is asked for; give another --workdir"):
        Heldout(other, ("standard",), tmp_path)


@pytest.mark.slow
def test_the_same_command_twice_gives_the_same_quality(settings, tmp_path):
    models = ("standard", "slam_v4")
    boards = [
        run(Heldout(settings, models, tmp_path / name), tmp_path / name) for name in ("one", "two")
    ]
    kept = ("system", "rank", *("loss", "bits_per_byte", "top1", "top5", "difference_from_above"))
    one, two = ([{key: row[key] for key in kept} for row in board["rows"]] for board in boards)
    assert one == two and len(one) == 2
    for row in boards[0]["rows"]:
        first, second = (run["validation_loss"] for run in row["runs"])
        assert first != second  # another seed is another run
    assert schema_errors(json.loads((tmp_path / "one" / "leaderboard.json").read_text())) == []
