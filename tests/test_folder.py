"""Folders of users: which tables are read, and the messages for what cannot be used."""

import csv
import json
import math
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slam_jax.data import DataConfig, evaluation_batches, prepare, training_batches
from slam_jax.data.folder import SPLITS, read_table
from slam_jax.data.numbers import find_outliers
from slam_jax.data.records import DataError
from slam_jax.errors import ConfigError
from slam_jax.evaluation.answers import number_scenes
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
    """Twelve pictures, each with two questions and two numbers. One number is often missing."""
    folder, rows = tmp_path / "own", []
    for i in range(12):
        image = picture(folder, f"{i}.png", (20 * i, 0, 0))
        for prompt in ("how red?", "which?"):
            row = {"image": image, "prompt": prompt, "answer": str(i), "width": 10.0 + i, "id": "x"}
            rows.append(row if i % 4 else row | {"price": 3 * i})
    return write(folder, rows)


def config(path: Path, **fields: Any) -> DataConfig:
    defaults = {"batch_size": 4, "stages": ((0, {"all": 1.0}),), "vocab_size": 300}
    defaults |= {"table_version": 2, "max_damaged_records": 0}
    return DataConfig(name="folder", path=str(path), **(defaults | fields))


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
    """That column has no name."""
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
    expected = (14.5 - format_.mean[0]) / format_.scale[0]  # type: ignore[index]
    assert math.isclose(2 * vectors[0, 0], expected, rel_tol=1e-6) and np.isnan(vectors[1]).all()


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
        ({"text": "x", "answer": [["a"]]}, "answer: a list; expected a text"),
        ({"text": "x", "answer": []}, "answer: it is empty; give every row one"),
        ({"image": ["huge.png", 3], "answer": "a"}, "image: .*huge.png has 10,000 x 10,000 pix"),
        ({"text": "x", "answer": "a", "split": "odd"}, "split: 'odd' is none of train, validation"),
        ({"image": "no.png", "answer": "a"}, "image: .*no.png: no such file"),
        ({"image": "data.jsonl", "answer": "a"}, "image: .*data.jsonl is no picture of a known"),
        ({"image": "huge.png", "answer": "a"}, "huge.png has 10,000 x 10,000 pixels; at most 64"),
        ({"text": "x", "answer": " \t"}, "answer: it is empty"),
        ({"text": "x", "answer": "a", "n": "1,5"}, "n: '1,5' is no finite number; write it like"),
        ({"text": "x", "answer": "a", "n": "1_1"}, "n: '1_1' is no finite number"),
        ({"text": "x", "answer": "a", "n": "12%"}, "n: '12%' is no finite number"),
        ({"text": "y" * 400_000, "answer": "a"}, "text: 400,000 letters .'yyy.*at most 16,384 are"),
        (
            {"image": "data:image/png;base64," + "Q" * 5000, "answer": "a"},
            "image: 'data:.* no path",
        ),
        ('{"text": "x", "answer": "a", "answer": "b"}', "the name 'answer' is there twice"),
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
    message = str(error.value)
    assert "\n" not in message and "data.max_damaged_records=1" in message and len(message) < 500
    found = prepare(config(tmp_path, max_damaged_records=1), model=MODEL)
    assert sum(map(len, (found.train, found.validation, found.test))) == len(GOOD)


def test_a_picture_that_is_broken_further_on_is_named_when_it_is_shown(tmp_path):
    folder = tmp_path / "own"
    rng = np.random.default_rng(0)
    names = [picture(folder, f"{i}.png", (i, 0, 0)) for i in range(9)]
    rows: list[Any] = [{"image": name, "answer": "a"} for name in names]
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
        (
            json.dumps([{"text": "x", "answer": "a"}], indent=1).splitlines(),
            "no row is for validation",
        ),
        (["[", '{"text": "x", "answer": "a"},', '{"text"'], "the array in line 3 is no JSON"),
        (["[", '{"text": "x", "answer": "a"}', '{"text": 1}]'], "line 3 is no JSON .*',' or ']'"),
        (["{", '{"text": "x", "answer": "a"}'], "row 1: no JSON .*; no row is for validation"),
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
            "data.stages: folder has no view 'text'; it has image, aux, image_aux, all",
        ),
        ({}, {"aux_slots": False}, r"model.aux_slots is False; expected True, as .* \(width"),
        ({}, {"max_aux": 1}, "model.max_aux is 1; expected at least 2, as .* has 2 columns of"),
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


def test_rows_about_one_picture_are_one_scene(own):
    """Also where files differ and pixels do not, and in each view that shows the row."""
    lines = (own / "data.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"split": SPLITS[i // 2 % 3]} for i, line in enumerate(lines)]
    same = picture(own, "same.bmp", (40, 0, 0))  # as 2.png
    rows[23] |= {"image": same, "split": "test"}
    rows.append({"image": None, "width": 1.0, "answer": "0", "split": "test"})
    tests = [i for i, row in enumerate(rows) if row.get("split") == "test"]
    dataset = prepare(config(write(own, rows)), model=MODEL)
    for view in ("image", "all"):
        found = [
            example
            for batch in evaluation_batches(dataset.test, dataset.tokenizer, view, 4, seed=0)
            for example in batch.examples
        ]
        shown: Any = {example.record: example.contents for example in found}
        assert [*shown] == [*range(len(tests))][: len(found)]
        scenes = number_scenes(shown)
        pictures = [rows[tests[i]]["image"] for i in shown]
        alike = ["2.png" if name == same else name for name in pictures]
        assert [scenes[i] for i in shown] == [alike.index(name) for name in alike]
    assert len(found) == len(tests)


# --- Tables as other programs write them


def read_csv(folder: Path, *lines: str, **options: Any) -> Any:
    return read_table(write(folder, list(lines), "data.csv"), **options)


def texts_and_answers(table: Any) -> set[tuple[str | None, str]]:
    return {(row.text, row.answers[0]) for rows in table.rows.values() for row in rows}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("text,answer,answer", "t,a,b"), "row 1: two columns have the name 'answer'"),
        (("text,answer,w, w", "t,a,1,2"), "row 1: two columns have the name 'w'"),
        (("text,answer", '"t0",a', '"t1,a', '"t2",a', '"t3",a'), "that begins in line 3 is no CSV"),
        (("text,answer", '"t0",a', '"t1,a', "t2,a"), "that begins in line 3 is no CSV"),
        (("text,answer", '"two\nlines",a', 't1,"a" b'), "that begins in line 4 is no CSV"),
    ],
)
def test_a_csv_that_could_be_misread_is_refused_with_its_line(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        read_csv(tmp_path, *lines)


def test_blanks_after_the_commas_of_a_csv_are_no_part_of_its_values(tmp_path):
    rows = [f't{i}, "what is it?", "a, ""{i}"" cat", {i}' for i in range(9)]
    table = read_csv(tmp_path, "text, prompt, answer, width", *rows)
    assert texts_and_answers(table) == {(f"t{i}", f'a, "{i}" cat') for i in range(9)}
    assert {row.prompt for row in table.rows["train"]} == {"what is it?"}
    assert table.columns == ("width",)


def test_a_long_field_of_a_csv_is_named_with_its_row_and_column(tmp_path):
    rows = [f"t{i},a" for i in range(9)]
    table = read_csv(tmp_path, "text,answer", "x" * 200_000 + ",a", *rows, context_length=100)
    [(line, reason)] = table.bad
    assert line == 2 and reason.startswith("text: 200,000 letters ('xxx") and len(reason) < 250


def test_nan_of_a_data_frame_is_a_missing_value(tmp_path):
    parts = ("text", "prompt", "kind", "n", "image")
    rows = [{"text": f"t{i}", "answer": "a", "n": i} for i in range(9)]
    rows[0] |= dict.fromkeys(parts[1:], math.nan)
    rows += [{"text": math.nan, "answer": "a", "n": 3}, {"text": "t", "answer": math.nan, "n": 3}]
    table = read_table(write(tmp_path, rows))
    assert table.columns == ("n",)
    assert table.bad == ((11, "answer: it is empty; give every row one"),)
    every: list[Any] = [row for rows in table.rows.values() for row in rows]
    assert {(row.prompt, row.kind, row.image) for row in every} == {("", "all", None)}
    assert (None, "a") in texts_and_answers(table)
    assert [np.isnan(row.numbers[0]) for row in every if row.text == "t0"] == [True]


def test_usual_spellings_of_splits_are_understood(tmp_path):
    words = ["Train", " training", "val", "DEV", "valid", "testing", "test "]
    rows = [{"text": str(i), "answer": "a", "split": word} for i, word in enumerate(words)]
    found = read_table(write(tmp_path, rows)).rows
    assert [[row.text for row in found[split]] for split in SPLITS] == [
        ["0", "1"],
        ["2", "3", "4"],
        ["5", "6"],
    ]


def test_columns_that_are_not_used_are_named_with_the_reason_and_the_likely_name(tmp_path, caplog):
    rows = [
        {"text": f"t{i}", "answer": "a", "question": "why?", "image_path": "0.png", "weight": "1,5"}
        | {" kind": "b", "label": "c", "code": f"{i}_1", "long": "y" * 9_000, "n": "NA" if i else 1}
        for i in range(30)
    ]
    dataset = prepare(config(write(tmp_path, rows)), model=MODEL)
    [note] = dataset.notes
    assert note.startswith("columns that are not used: 'question' (row 1: 'why?' is no number; ")
    assert "did you mean 'prompt'?), 'image_path' (row 1" in note and "mean 'image'?" in note
    assert "'weight' (row 1: '1,5' is no number)" in note and "did you mean 'kind'?" in note
    assert "'code' (row 1: '0_1' is no number)" in note
    assert "'label' (row 1: 'c' is no number)" in note and len(note) < 600
    assert dataset.table is not None and dataset.table.columns == ("n",)
    assert [record.message for record in caplog.records] == [f"{tmp_path / 'data.jsonl'}: {note}"]


def test_csv_and_jsonl_are_read_alike(tmp_path):
    csv_rows = [
        f"t{i},{'True' if i % 2 else 'FALSE'},{'true' if i % 3 else 'False'},NA" for i in range(9)
    ]
    a = read_csv(tmp_path / "a", "text,answer,flag,n", *csv_rows, "t9,True,,3")
    rows = [{"text": f"t{i}", "answer": i % 2 > 0, "flag": i % 3 > 0, "n": None} for i in range(9)]
    rows += [{"text": "t9", "answer": True, "flag": None, "n": 3}]
    b = read_table(write(tmp_path / "b", rows))
    assert a.columns == b.columns == ("flag", "n") and not a.bad and not b.bad
    for split in SPLITS:
        for x, y in zip(a.rows[split], b.rows[split], strict=True):
            assert x[:2] == y[:2] and x[3:6] == y[3:6] and x.answers[0] in ("true", "false")
            np.testing.assert_array_equal(x.numbers, y.numbers)


def test_answers_that_look_alike_are_one_answer(tmp_path):
    spellings = ("caf\u00e9", "cafe\u0301", "caf\u00e9 ", " cafe\u0301")
    rows = [{"text": f" t{i} ", "answer": spellings[i % 4], "kind": "k "} for i in range(12)]
    write(tmp_path, rows)
    table = read_table(tmp_path)
    assert texts_and_answers(table) == {(f" t{i} ", "caf\u00e9") for i in range(12)}
    assert {row.kind for row in table.rows["train"]} == {"k"}
    assert len(table.notes) == 1 and "(first in row 1)" in table.notes[0]
    as_0_11 = read_table(tmp_path, version=None)
    assert {answer for _, answer in texts_and_answers(as_0_11)} == set(spellings)


def test_hidden_files_are_ignored_and_several_tables_are_named(tmp_path):
    folder = write(tmp_path / "own", GOOD)
    (folder / "._data.jsonl").write_bytes(b"\x00\x05\x16\x07")
    assert len(read_table(folder).rows["train"]) > 20
    write(folder, GOOD, "test.jsonl")
    with pytest.raises(DataError, match=r"found data.jsonl, test.jsonl; .* column 'split'"):
        read_table(folder)
    (tmp_path / "own.xls").write_text("t")
    with pytest.raises(DataError, match=r"own.xls: data is read from .jsonl, .json, .csv"):
        read_table(tmp_path / "own.xls")
    (tmp_path / "own.xls").unlink()
    (tmp_path / "cats").mkdir()
    with pytest.raises(DataError, match=r"found none; the folder holds cats, own; write a table"):
        read_table(tmp_path)


# --- The same picture in several rows


def split_of(table: Any) -> dict[int, str]:
    return {int(r.where.split()[-1]): split for split, rows in table.rows.items() for r in rows}


@pytest.fixture
def twins(tmp_path) -> Path:
    """Fifteen pictures, each under four names."""
    folder, rows = tmp_path / "twins", []
    for i in range(15):
        name = picture(folder, f"{i}.png", (10 * i, 9, 9))
        (folder / f"copy{i}.png").write_bytes((folder / name).read_bytes())
        rows += [{"image": f, "answer": "a"} for f in (name, f"./{name}", f"copy{i}.png")]
    return write(folder, rows)


def test_equal_pictures_are_in_one_split_whatever_their_names(twins):
    table = read_table(twins)
    splits = split_of(table)
    assert all(splits[3 * i + 1] == splits[3 * i + 2] == splits[3 * i + 3] for i in range(15))
    assert set(splits.values()) == set(SPLITS) and not table.notes


def test_a_table_of_0_11_keeps_its_splits_and_is_warned_of_shared_pictures(twins):
    table = read_table(twins, version=None)
    splits = split_of(table)
    for line, row in enumerate(map(json.loads, (twins / "data.jsonl").read_text().splitlines()), 1):
        place = (
            int.from_bytes(sha256(json.dumps(row["image"]).encode()).digest()[:8], "big") / 2**64
        )
        assert splits[line] == ("train" if place < 0.8 else "validation" if place < 0.9 else "test")
    shared = sum(len({splits[3 * i + j] for j in (1, 2, 3)}) > 1 for i in range(15))
    assert shared and table.notes[0].startswith(
        f"pictures or texts that are in more than one split: {shared} (first in row"
    )


def test_a_picture_in_two_given_splits_is_told_and_a_split_holds_for_equal_pictures(twins):
    rows = [json.loads(line) for line in (twins / "data.jsonl").read_text().splitlines()]
    for i, split in ((2, "test"), (3, "train"), (5, "test"), (7, "validation")):
        rows[i]["split"] = split
    table = read_table(write(twins, rows))
    splits = split_of(table)
    assert [splits[line] for line in range(1, 10)] == [
        *("test", "test", "test"),
        *("train", "train", "test"),
        *("validation", "validation", "validation"),
    ]
    [note] = table.notes
    assert "more than one split: 1 (first in row 6)" in note


# --- Numbers by name, and outliers


def numbers_table(folder: Path, *names: str) -> Path:
    """A table with `names` as number columns: width is 100 + i and price is i % 3."""
    values = {"width": lambda i: 100.0 + i, "price": lambda i: float(i % 3)}
    rows = [
        {"text": f"t{i}", "answer": "a"} | {n: values.get(n, float)(i) for n in names}
        for i in range(30)
    ]
    return write(folder, rows)


def test_another_table_is_read_by_the_names_of_its_columns(tmp_path):
    trained = prepare(config(numbers_table(tmp_path / "a", "width", "price")), model=MODEL)
    known: dict[str, Any] = dict(
        tokenizer=trained.tokenizer, aux_format=trained.aux_format, model=MODEL
    )
    other = numbers_table(tmp_path / "b", "price", "width")
    lines = (other / "data.jsonl").read_text().splitlines()
    first = json.loads(lines[0]) | {"split": "test"}
    del first["width"]
    write(other, [first, *map(json.loads, lines[1:])])
    a, b = trained.test, prepare(config(other), **known).test
    by_text = {r.text: r.numbers for r in a.rows}  # type: ignore[attr-defined]
    for row in b.rows:  # type: ignore[attr-defined]
        if row.text != "t0":
            np.testing.assert_array_equal(row.numbers, by_text[row.text])
        else:
            np.testing.assert_array_equal(row.numbers, [math.nan, 0])


@pytest.mark.parametrize("names", [("age", "height"), ("width",), ("width", "price", "age")])
def test_a_table_with_other_columns_is_refused_with_both_sets_of_names(tmp_path, names):
    trained = prepare(config(numbers_table(tmp_path / "a", "width", "price")), model=MODEL)
    known: dict[str, Any] = dict(
        tokenizer=trained.tokenizer, aux_format=trained.aux_format, model=MODEL
    )
    message = f"number columns {', '.join(names)}, and the checkpoint was trained on width, price"
    with pytest.raises(DataError, match=message):
        prepare(config(numbers_table(tmp_path / "b", *names)), **known)
    with pytest.raises(DataError, match="the checkpoint was trained on none; give"):
        prepare(config(tmp_path / "b"), **(known | {"aux_format": None}))


def test_one_outlier_does_not_hide_the_other_numbers(tmp_path):
    rows = [
        {"text": f"t{i}", "answer": "a", "w": i % 10, "split": SPLITS[i % 3]} for i in range(90)
    ]
    rows[6]["w"] = 1e9
    dataset = prepare(config(write(tmp_path, rows)), model=MODEL)
    format_: Any = dataset.aux_format
    usual = [row["w"] for row in rows[::3] if row["w"] < 1e9]
    assert math.isclose(format_.mean[0], np.mean(usual))
    assert math.isclose(format_.scale[0], np.std(usual))
    assert len({format_.encode({"w": w}, 4).tobytes() for w in (*range(10), 1e9)}) == 11
    assert dataset.notes == (
        "column 'w': 1 of 30 training numbers far from the others, left out of mean and scale "
        "(first in row 7: 1e+09)",
    )
    as_0_11 = prepare(config(tmp_path, table_version=None), model=MODEL)
    every = [row["w"] for row in rows[::3]]
    assert as_0_11.aux_format.mean == (np.mean(every),)  # type: ignore[union-attr]
    assert "the other numbers hardly differ" in as_0_11.notes[0]


@pytest.mark.parametrize(
    ("numbers", "outliers"),
    [
        ([], 0),
        ([3.0, 3.0, math.nan], 0),
        ([0.0] * 99 + [1.0], 0),
        ([0.0] * 90 + [1.0, 2.0, 3.0, 2.0, 1e6], 1),
        ([*np.random.default_rng(0).normal(size=1_000)], 0),
        ([*np.random.default_rng(0).uniform(size=50), 30.0, -30.0, math.nan], 2),
    ],
)
def test_outliers_are_far_beyond_the_quartiles(numbers, outliers):
    assert find_outliers(np.array(numbers, float)).sum() == outliers
