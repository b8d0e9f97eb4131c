"""Mixtures of data sets, sets of TFDS, and data sets that are given in Python."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_same
from own_data import COUNT, PROMPT, answer, build_colours, png
from test_folder import MODEL, config, write

from slam_jax.data import ColumnsConfig, DataConfig, Row, dataset_from_rows, prepare
from slam_jax.data.mixture import MixedOrder
from slam_jax.data.pipeline import training_batches
from slam_jax.data.records import DataError
from slam_jax.data.tfds_sets import _slices
from slam_jax.errors import ConfigError
from slam_jax.reporting.checkpoint import evaluate_checkpoint
from slam_jax.training import Experiment, default_config, train


def texts(folder: Path, kind: str, count: int, **numbers: Any) -> str:
    rows = [
        {"text": f"{kind} {i}", "answer": "a", "kind": kind}
        | {k: v + i for k, v in numbers.items()}
        for i in range(count)
    ]
    return str(write(folder / kind, rows))


def mixed(*parts: Any, **fields: Any) -> DataConfig:
    return dataclasses.replace(config(Path(), **fields), path=None, mixture=parts)


def test_each_set_is_drawn_as_often_as_its_weight_says():
    order = MixedOrder([(5, 3.0), (100, 1.0), (7, 1e-9)], seed=3)
    drawn = [order[i] for i in range(3 * 4096)]
    for block in range(3):
        part = drawn[block * 4096 : (block + 1) * 4096]
        shares = Counter(0 if i < 5 else 1 if i < 105 else 2 for i in part)
        assert shares == {0: 3071, 1: 1024, 2: 1}
    assert set(Counter(i for i in drawn if i < 5).values()) <= {1842, 1843}
    second = [i for i in drawn if 5 <= i < 105]
    assert all(len(set(second[start : start + 100])) == 100 for start in range(0, 3000, 100))
    assert second[:100] != second[100:200], "reshuffled"
    again = MixedOrder([(5, 3.0), (100, 1.0), (7, 1e-9)], seed=3)
    assert [again[i] for i in (10_000, 5, 9_999_999_999)] == [
        drawn[10_000],
        drawn[5],
        order[9_999_999_999],
    ]
    assert [MixedOrder([(5, 3.0), (100, 1.0)], seed=4)[i] for i in range(50)] != drawn[:50]


@pytest.mark.parametrize("weights", [(2e4, 1.0, 1.0), (1e6, *[1.0] * 100)])
def test_sets_of_little_weight_are_drawn_once_a_block(weights):
    order = MixedOrder([(1, weight) for weight in weights], seed=0)
    drawn = Counter(order[i] for i in range(4096))
    assert drawn == {0: 4097 - len(weights)} | dict.fromkeys(range(1, len(weights)), 1)


def test_a_mixture_draws_rows_by_weight_and_resumes_exactly(tmp_path):
    places = texts(tmp_path, "x", 40, width=1), texts(tmp_path, "y", 90, price=5)
    settings = mixed((places[0], 3.0), (places[1], 1.0), batch_size=8)
    dataset = prepare(settings, model=MODEL)
    assert dataset.aux_format is not None and dataset.aux_format.names == ("width", "price")
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 130
    batches = training_batches(dataset.train, dataset.tokenizer, settings)
    taken = list(itertools.islice(batches, 128))
    firsts = Counter(
        dataset.tokenizer.decode(text[:1])
        for _, batch in taken
        for text in np.asarray(batch.inputs.text)
    )
    assert abs(firsts["x"] / 1024 - 0.75) < 0.05 and firsts.total() == 1024
    for _, batch in taken[:20]:
        inputs: Any = batch.inputs
        for text, mask in zip(inputs.text, inputs.aux_mask, strict=True):
            is_x = dataset.tokenizer.decode(text[:1]) == "x"
            assert mask.tolist() == [is_x, not is_x], "a row has the numbers of its own set alone"
    again = prepare(settings, model=MODEL)
    resumed = training_batches(again.train, again.tokenizer, settings, start_step=100)
    for (_, batch), (_, other) in zip(resumed, taken[100:], strict=False):
        assert_same(batch, other)
    known = prepare(settings, dataset.tokenizer, aux_format=dataset.aux_format, model=MODEL)
    assert known.aux_format == dataset.aux_format and len(known.test) == len(dataset.test)


def test_a_mixture_may_have_sets_by_name(tmp_path):
    settings = mixed(("digits", 1.0), (texts(tmp_path, "x", 30), 1.0), batch_size=4)
    dataset = prepare(settings, model=MODEL)
    assert len(dataset.test) > 360 and set(dataset.train.views) >= {"image", "text", "all"}
    assert not dataset.train.complete("all")
    _, batch = next(training_batches(dataset.train, dataset.tokenizer, settings))
    assert_same(
        np.asarray(batch.inputs.image_mask) ^ np.asarray(batch.inputs.text_mask).any(axis=1),
        np.ones(4, bool),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mixture": [("a", 0)]},
            r"mixture\[0\] is \('a', 0\); it must be \(path or name, weight\)",
        ),
        ({"mixture": ["a"]}, r"mixture\[0\] is 'a'; it must be"),
        ({"mixture": [("a", 1)], "path": "b"}, r"data.path is 'b'; expected None beside data.mix"),
        ({"mixture": [("sort_of_clevr", 1)]}, "data.mixture has 'sort_of_clevr', which has scenes"),
        ({"name": "own"}, "data.name is 'own': the run had a data set that was given in Python"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_told_why(fields, message):
    with pytest.raises(ConfigError, match=message):
        prepare(DataConfig(**{"name": "folder", **fields}), model=MODEL)


# --- TFDS


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    build_colours(folder)
    return str(folder)


def colours(directory: str, **columns: Any) -> DataConfig:
    stages = ((0, {"all": 1.0}),)
    names = ColumnsConfig(**columns)
    return DataConfig("tfds/colours", data_dir=directory, stages=stages, columns=names)


def test_the_features_of_a_set_of_tfds_are_mapped(directory):
    dataset: Any = prepare(colours(directory), model=MODEL)
    sources = (dataset.train, dataset.validation, dataset.test)
    splits = [[source.rows[i] for i in range(len(source))] for source in sources]
    assert [len(rows) for rows in splits] == [18, 2, 10]
    found = {(row.image, row.prompt, row.answers) for rows in splits for row in rows}
    assert found == {(png(i), PROMPT, (answer(i),)) for i in range(COUNT)}
    dataset = prepare(colours(directory, answer="said/text", prompt="label"), model=MODEL)
    rows = [dataset.test.rows[i] for i in range(10)]
    assert {(row.prompt, row.answers) for row in rows} == {
        (colour, (f"{colour} 0", f"{colour} 1")) for colour in ("red", "green")
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": "lable"}, "data.columns.answer: colours has no feature 'lable'; did you mean"),
        ({"numbers": ["id"]}, "data.columns.numbers is .*; expected None"),
    ],
)
def test_a_feature_that_is_not_there_is_named(columns, message, directory):
    with pytest.raises(ConfigError, match=message):
        prepare(colours(directory, **columns), model=MODEL)


@pytest.mark.parametrize(
    ("known", "slices"),
    [
        (["train", "test"], ("train[:-10%]", "train[-10%:]", "test")),
        (["train", "val"], ("train[:-10%]", "val", "train[-10%:]")),
        (["train"], ("train[:-20%]", "train[-20%:-10%]", "train[-10%:]")),
        (["test", "validation", "train", "extra"], ("train", "validation", "test")),
    ],
)
def test_missing_splits_of_tfds_are_the_end_of_the_training_records(known, slices):
    assert _slices("a", known) == slices
    with pytest.raises(DataError, match="a has the splits test; expected one named train"):
        _slices("a", ["test"])


# --- Given in Python


def own_rows() -> dict[str, list[Row]]:
    rows = [Row(png(i), None, None, PROMPT, (answer(i), "a colour")) for i in range(COUNT)]
    return {"train": rows[:20], "validation": rows[20:25], "test": rows[25:]}


@pytest.mark.release
def test_a_given_data_set_trains_resumes_and_is_evaluated(tmp_path):
    settings: Any = default_config("tiny")
    settings.model.image = {**settings.model.image, "size": 12, "stage_widths": (8,)}
    settings.data.batch_size, settings.data.vocab_size = 4, 259
    settings.run.num_steps, settings.run.save_every = 2, 1
    experiment = Experiment.from_config(settings)
    dataset = dataset_from_rows(own_rows(), experiment.data, model=experiment.model)
    assert len(dataset.train) == 20 and dataset.train.views == ("image", "all")
    train(settings, tmp_path / "run", dataset=dataset)
    again = train(settings, tmp_path / "run", dataset=dataset)
    assert int(again.step) == 2
    evaluation = evaluate_checkpoint(tmp_path / "run", dataset=dataset)
    assert evaluation.metrics["data"]["rows"] == {"train": 20, "validation": 5, "test": 5}
    with pytest.raises(ConfigError, match="give it again as dataset= of slam_jax.train or"):
        evaluate_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"test": []}, ConfigError, r"rows\['test'\] is \[\]; expected at least one row"),
        ({"dev": []}, ConfigError, "rows has no split 'dev'"),
        (
            {"test": [Row(None, "t " * 5_000, None, "", ("a",))]},
            DataError,
            "row 1: text: .* tok",
        ),
        ({"test": [Row(None, "t", np.zeros(1), "", ("a",))]}, ConfigError, "numbers need a table"),
        (
            {"test": [Row((1, 2), None, None, "", ("a",))]},
            DataError,
            "row 1: image: 2 pictures",
        ),
    ],
)
def test_rows_that_make_no_data_set_are_refused(change, error, message):
    settings = DataConfig(stages=((0, {"all": 1.0}),), max_damaged_records=0)
    with pytest.raises(error, match=message):
        dataset_from_rows({**own_rows(), **change}, settings, model=MODEL)
