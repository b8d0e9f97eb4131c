"""A folder of one's own: what its table may say, and what is said of what cannot be used."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slam_jax.data import DataConfig, evaluation_batches, prepare, training_batches
from slam_jax.data.folder import SPLITS, read_table
from slam_jax.data.records import DataError
from slam_jax.errors import ConfigError
from slam_jax.slam_v3 import ImageConfig, SlamV3Config

MODEL = SlamV3Config(vocab_size=1, aux_dim=4, aux_slots=True, image=ImageConfig(size=16))


def write(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder


def picture(folder: Path, name: str, colour: Any = (200, 10, 10), size=(20, 30)) -> str:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", size, colour).save(folder / name)
    return name


@pytest.fixture
def own(tmp_path) -> Path:
    """Twelve pictures with two questions each, and two numbers of which one is missing at times."""
    folder, rows = tmp_path / "own", []
    for i in range(12):
        image = picture(folder, f"{i}.png", (20 * i, 0, 0))
        for prompt in ("how red?", "which?"):
            row = {"image": image, "prompt": prompt, "answer": str(i), "width": 10.0 + i, "id": "x"}
            rows.append(row if i % 4 else row | {"price": 3 * i})
    return write(folder, rows)


def config(path: Path, **fields: Any) -> DataConfig:
    fields = {"batch_size": 4, "stages": ((0, {"all": 1.0}),), "vocab_size": 300} | fields
    return DataConfig(name="folder", path=str(path), max_damaged_records=0, **fields)


def test_every_row_is_in_one_split_and_a_picture_in_one_alone(own):
    table = read_table(own)
    assert table.columns == ("width", "price") and table.ignored == ("id",) and not table.bad
    assert sum(map(len, table.rows.values())) == 24
    pictures = [{row.image for row in table.rows[split]} for split in SPLITS]
    assert all(pictures) and sum(map(len, pictures)) == 12 == len(set.union(*pictures))
    assert table.rows["train"][0].where == f"{own / 'data.jsonl'}, row 1"


def test_rows_stay_in_their_split_when_others_come(tmp_path):
    rows = [{"text": f"text {i}", "answer": "a"} for i in range(100)]
    before = read_table(write(tmp_path / "a", rows[:60])).rows
    after = read_table(write(tmp_path / "b", rows)).rows
    for split in SPLITS:
        texts = [row.text for row in after[split]]
        assert [row.text for row in before[split]] == [
            t for t in texts if t and int(t.split()[1]) < 60
        ]
    assert 70 <= len(after["train"]) <= 90


def test_a_column_split_is_followed(tmp_path):
    rows = [{"text": str(i), "answer": "a", "split": SPLITS[i % 3]} for i in range(9)]
    found = read_table(write(tmp_path, rows)).rows
    assert [[int(row.text or "") % 3 for row in found[split]] for split in SPLITS] == [
        [0] * 3,
        [1] * 3,
        [2] * 3,
    ]


def test_csv_and_jsonl_of_the_same_rows_are_the_same_table(own, tmp_path):
    rows = [json.loads(line) for line in (own / "data.jsonl").read_text().splitlines()]
    with (own / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "prompt", "answer", "width", "id", "price"])
        writer.writeheader()
        writer.writerows(rows)
    a, b = read_table(own / "data.jsonl"), read_table(own / "table.csv")
    assert a.columns == b.columns and a.ignored == b.ignored
    for split in SPLITS:
        for x, y in zip(a.rows[split], b.rows[split], strict=True):
            assert x[:2] == y[:2] and x[3:6] == y[3:6]
            np.testing.assert_array_equal(x.numbers, y.numbers)
    with pytest.raises(DataError, match=r"expected one .jsonl or .csv in it, found data.jsonl, "):
        read_table(own)


def test_the_index_that_pandas_writes_is_no_input(tmp_path):
    """Its name is empty."""
    rows = [f"{i},text {i},{i % 2},{0.5 * i}" for i in range(9)]
    write(tmp_path, [",text,answer,width", *rows, "9,text 9,1,4.5,more"], "data.csv")
    table = read_table(tmp_path)
    assert table.columns == ("width",) and not table.ignored
    assert sum(map(len, table.rows.values())) == 9
    assert table.bad == ((11, "more values than columns"),)


def test_batches_show_what_a_row_has_and_mask_what_it_lacks(own):
    dataset = prepare(config(own), model=MODEL)
    assert dataset.train.views == ("image", "aux", "image_aux", "all")
    _, batch = next(training_batches(dataset.train, dataset.tokenizer, config(own)))
    inputs: Any = batch.inputs
    assert inputs.text is None and inputs.image.shape == (4, 16, 16, 3)
    assert inputs.image_mask.all() and inputs.aux.shape == (4, 2, 4)
    assert inputs.aux_mask[:, 0].all() and np.isfinite(inputs.aux).all()
    missing = [i for i in range(12) if i % 4]
    for found in evaluation_batches(dataset.train, dataset.tokenizer, "all", 4, seed=0):
        masks: Any = found.batch.inputs.aux_mask
        for example, mask in zip(found.examples, masks, strict=False):
            assert mask[1] == (int(example.answers[0]) not in missing)


def test_rows_without_a_picture_or_a_text_are_masked(tmp_path):
    folder = tmp_path / "own"
    rows = [{"text": f"text {i}", "answer": "a"} for i in range(20)]
    rows += [{"image": picture(folder, f"{i}.png"), "answer": "b"} for i in range(20)]
    dataset = prepare(config(write(folder, rows)), model=MODEL)
    seen = set()
    batches = training_batches(dataset.train, dataset.tokenizer, config(folder))
    for _, (_, batch) in zip(range(8), batches, strict=False):
        inputs: Any = batch.inputs
        for i in range(4):
            answer = dataset.tokenizer.decode(batch.tokens[i, 0, 1 : batch.length[i, 0]])
            assert inputs.image_mask[i] == (answer == "b") == (not inputs.text_mask[i].any())
            assert inputs.image[i].any() == (answer == "b")
            seen.add(answer)
    assert seen == {"a", "b"}


def test_numbers_are_standardised_by_the_training_rows(own):
    dataset = prepare(config(own), model=MODEL)
    format_ = dataset.aux_format
    assert format_ is not None and format_.names == ("width", "price")
    widths = [float(row.numbers[0]) for row in dataset.train.rows]  # type: ignore[attr-defined]
    assert math.isclose(format_.mean[0], np.mean(widths))  # type: ignore[index]
    vectors = format_.encode({"width": 14.5}, 4)
    assert format_.decode(vectors) == [14.5, None]


def test_training_pictures_are_cropped_at_random_and_the_others_are_not(tmp_path):
    folder, rng, rows = tmp_path / "own", np.random.default_rng(0), []
    folder.mkdir()
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "answer": "a"})
    dataset = prepare(config(write(folder, rows), augment=0.5), model=MODEL)

    def shown(source, seed):
        return source.render(source[0], "image", np.random.default_rng(seed)).image

    assert (shown(dataset.train, 1) != shown(dataset.train, 2)).any()
    np.testing.assert_array_equal(shown(dataset.train, 1), shown(dataset.train, 1))
    np.testing.assert_array_equal(shown(dataset.test, 1), shown(dataset.test, 2))


def test_inputs_are_left_out_at_random_in_training_and_never_all(own):
    dataset = prepare(config(own, drop_inputs=0.5), model=MODEL)
    seen = set()
    for seed in range(60):
        example = dataset.train.render(dataset.train[0], "all", np.random.default_rng(seed))
        has_aux = example.aux is not None and not np.isnan(example.aux).all()
        seen.add((example.image is not None, has_aux))
    assert seen == {(True, True), (True, False), (False, True)}
    test = dataset.test.render(dataset.test[0], "all", np.random.default_rng(0))
    assert test.image is not None and test.aux is not None and not np.isnan(test.aux).all()
    assert not dataset.train.complete("image_aux") and dataset.train.complete("image")
    _, batch = next(training_batches(dataset.train, dataset.tokenizer, config(own)))
    assert batch.inputs.image_mask is not None and batch.inputs.aux_mask is not None


def test_a_column_is_of_numbers_where_most_of_it_is(tmp_path):
    rows = [{"text": str(i), "answer": "a", "n": "?" if i == 0 else i, "id": "x"} for i in range(9)]
    table = read_table(write(tmp_path, [*rows, {"text": "t", "answer": "a", "id": 3}]))
    assert table.columns == ("n",) and table.ignored == ("id",)
    assert [(line, reason) for line, reason in table.bad] == [(1, "n: '?' is no finite number")]


GOOD = [{"text": f"text {i}", "answer": "a", "n": i} for i in range(30)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "answer: it is empty; give every row one"),
        ({"text": "x", "answer": " " * 0}, "answer: it is empty"),
        ({"answer": "a"}, "nothing to answer from: give it an image, a text or a number"),
        ({"text": "x", "answer": "a", "n": "12 cm"}, "n: '12 cm' is no finite number"),
        ({"text": "x", "answer": "a", "n": 1e999}, "n: inf is no finite number"),
        ({"text": "x <eos>", "answer": "a"}, "text holds '<eos>', which is added by itself"),
        ({"text": "x", "answer": ["a"]}, "answer: a list; expected a text"),
        ({"text": "x", "answer": "a", "split": "dev"}, "split: 'dev' is none of train, validation"),
        ({"image": "no.png", "answer": "a"}, "image: .*no.png: no such file"),
        ({"image": "data.jsonl", "answer": "a"}, "image: .*data.jsonl is no picture of a known"),
        ({"image": "huge.png", "answer": "a"}, "huge.png has 10,000 x 10,000 pixels; at most 64"),
        ("{", r"no JSON \("),
        ("[1]", "a list; expected an object such as"),
        ({"text": "word " * 2000, "answer": "a"}, "text: [0-9,]+ tokens; model.context_length"),
        (
            {"text": "x", "prompt": "why " * 2000, "answer": "a"},
            "prompt and answer: [0-9,]+ tok",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_field(tmp_path, row, reason):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    write(tmp_path, [*GOOD, row])
    with pytest.raises(DataError, match=rf"data.jsonl, row 31: .*{reason}") as error:
        prepare(config(tmp_path), model=MODEL)
    assert "\n" not in str(error.value) and "data.max_damaged_records=1" in str(error.value)
    allowed = DataConfig(name="folder", path=str(tmp_path), stages=((0, {"all": 1.0}),))
    found = prepare(allowed, model=MODEL)
    assert sum(map(len, (found.train, found.validation, found.test))) == len(GOOD)


def test_a_picture_that_is_broken_further_on_is_named_when_it_is_shown(tmp_path):
    folder = tmp_path / "own"
    rng = np.random.default_rng(0)
    rows: list[Any] = [{"image": picture(folder, f"{i}.png"), "answer": "a"} for i in range(9)]
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:4000])
    write(folder, [*rows, {"image": "cut.png", "answer": "a", "split": "train"}])
    dataset = prepare(config(folder), model=MODEL)
    batches = training_batches(dataset.train, dataset.tokenizer, config(folder))
    with pytest.raises(DataError, match=r"data.jsonl, row 10, image: .*cut.png cannot be read"):
        for _ in range(9):
            next(batches)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows; write one question and its answer a line"),
        ([{"text": "x", "label": "a"}], "row 1: no column 'answer'; it has 'text', 'label'"),
        ([{"text": "x", "answer": "a"}] * 5, "no row is for validation; give at least three"),
        (["{"], r"row 1: no JSON .*; no row can be used"),
    ],
)
def test_a_table_that_cannot_be_used_is_told_why(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path, rows))


def test_a_place_without_a_table_is_named(tmp_path):
    with pytest.raises(DataError, match="no such folder; give data.path a folder"):
        read_table(tmp_path / "no")
    with pytest.raises(DataError, match="expected one .jsonl or .csv in it, found none"):
        read_table(tmp_path)
    (tmp_path / "data.csv").write_bytes("größe,answer\n1,a".encode("latin-1"))
    with pytest.raises(DataError, match="data.csv is no UTF-8 text"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("fields", "model", "message"),
    [
        ({"path": None}, {}, "data.path is not given; give it the folder"),
        (
            {"stages": ((0, {"text": 1.0}),)},
            {},
            "data.stages use the view 'text'; folder has",
        ),
        ({}, {"aux_slots": False}, r"model.aux_slots is False, and .* columns of numbers \(width"),
        ({}, {"max_aux": 1}, "model.max_aux is 1, and .* has 2 columns of numbers; raise it"),
    ],
)
def test_a_config_that_does_not_fit_the_table_is_told_why(own, fields, model, message):
    kw: dict[str, Any] = {"aux_slots": True, "image": ImageConfig(size=16)} | model
    given = {"name": "folder", "path": str(own), "stages": ((0, {"all": 1.0}),)} | fields
    with pytest.raises(ConfigError, match=message):
        prepare(DataConfig(**given), model=SlamV3Config(vocab_size=1, **kw))


def test_a_row_is_not_asked_in_a_view_that_shows_nothing_of_it(tmp_path):
    folder = tmp_path / "own"
    rows = [{"text": f"text {i}", "answer": "a", "split": SPLITS[i % 3]} for i in range(9)]
    rows += [
        {"image": picture(folder, f"{i}.png"), "n": i, "answer": "b", "split": SPLITS[i % 3]}
        for i in range(9)
    ]
    dataset = prepare(config(write(folder, rows)), model=MODEL)
    for view, answers in {"text": "aaa", "image": "bbb", "aux": "bbb", "all": "aaabbb"}.items():
        batches = evaluation_batches(dataset.test, dataset.tokenizer, view, 4, seed=0)
        assert "".join(e.answers[0] for batch in batches for e in batch.examples) == answers
