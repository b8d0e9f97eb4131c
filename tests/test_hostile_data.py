"""Files and folders that were damaged or made to do harm: refused in one line, in bounded time."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slam_jax.data import ColumnsConfig, DataConfig
from slam_jax.data.folder import read_table
from slam_jax.data.formats import find, open_picture
from slam_jax.data.formats.shards import _extended
from slam_jax.data.numbers import parse_number
from slam_jax.data.records import DataError
from slam_jax.data.texts import TextDataConfig, read_own_texts
from slam_jax.errors import ConfigError, InputError, UserError
from slam_jax.evaluation import read_answers
from slam_jax.training import CheckpointError, Checkpoints
from slam_jax.training.changes import read_saved

pyarrow: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def records_of(path: Path) -> list[Any]:
    return [each.record for each in find(path).read()]


def pictures_of(path: Path) -> list[Any]:
    return [open_picture(record["image"]) for record in records_of(path)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.parquet", "x.tar"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(DataError) as error:
            read_table(place)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/zero")
def test_a_link_to_a_device_is_not_read(tmp_path):
    (tmp_path / "data.jsonl").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="expected a file"):
        read_table(tmp_path)


def test_pictures_that_are_pipes_or_huge_are_bad_rows(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(3 << 30)
    rows = [{"image": name, "answer": "a"} for name in ("pipe.png", "huge.png")]
    rows += [{"text": f"text {i}", "answer": "a"} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reasons = [bad.reason for bad in read_table(tmp_path).bad]
    assert "pipe.png: expected a file" in reasons[0] and "expected at most" in reasons[1]


def test_a_file_that_was_written_again_is_read_again(tmp_path):
    def write(value: int) -> None:
        table = pyarrow.table({"image": [png(value)] * 3, "answer": [str(value)] * 3})
        parquet.write_table(table, tmp_path / "p" / "x.parquet")
        path = str(tmp_path / "a" / "data.arrow")
        with pyarrow.OSFile(path, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)

    for name in ("p", "a"):
        (tmp_path / name).mkdir()
    state = {"_data_files": [{"filename": "data.arrow"}]}
    (tmp_path / "a" / "state.json").write_text(json.dumps(state))
    for value in (0, 200):
        write(value)
        for name in ("p", "a"):
            assert pictures_of(tmp_path / name) == [png(value)] * 3
            assert {record["answer"] for record in records_of(tmp_path / name)} == {str(value)}


def test_damaged_arrow_and_parquet_files_are_refused(tmp_path):
    table = pyarrow.table(
        {"text": [f"text {i}" for i in range(50)], "answer": ["yes", "no"] * 25, "width": range(50)}
    )
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    arrow = sink.getvalue().to_pybytes()
    parquet.write_table(table, tmp_path / "x.parquet")
    whole, rng = (tmp_path / "x.parquet").read_bytes(), np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    refused = 0
    for i in range(40):
        content = bytearray(arrow if i % 2 else whole)
        # The second half: a damaged length in an Arrow header makes its library end the process.
        place = int(rng.integers(len(content) // 2, len(content)))
        content[place] ^= 1 << int(rng.integers(8))
        path = tmp_path / "a" if i % 2 else tmp_path / "x.parquet"
        (path / "data.arrow" if i % 2 else path).write_bytes(content)
        try:
            read_table(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused
    (tmp_path / "a" / "state.json").write_text('{"_data_files": true}')
    with pytest.raises(DataError, match="names no files"):
        read_table(tmp_path / "a")


def test_long_texts_are_no_numbers_at_once():
    assert parse_number("1" * 200_000 + "x") is None and parse_number("1" * 401) is None
    assert parse_number("-1.5e3") == -1500 and parse_number(".5") == 0.5 and parse_number("1.") == 1


def test_too_many_columns_of_numbers_are_refused(tmp_path):
    rows = [{"text": f"t{i}", "answer": "a", f"n{i}": 1} for i in range(1_100)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="1,100 columns of numbers; at most 1,024"):
        read_table(tmp_path)


def test_headers_of_shards_take_linear_time():
    assert _extended(b"2 " * (1 << 19), None, None) == (None, None)
    assert _extended(b"16 path=long.txt\n"[:16] + b"12 size=345\n", None, None)[1] == 345


def test_turns_without_a_text_are_bad_rows(tmp_path):
    def turns(value: Any) -> dict[str, Any]:
        told = [{"from": "human", "value": value}, {"from": "gpt", "value": "a"}]
        return {"image": None, "images": ["0.png"], "conversations": told}

    (tmp_path / "0.png").write_bytes(png(0))
    rows = [turns({"a": 1}), turns(["x", "y"]), turns(5), turns("q")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    records = records_of(tmp_path)
    assert records[0] == "a turn whose text is no text"
    assert [record["prompt"] for record in records[1:]] == ["x\ny", "5", "q"]
    assert all(record["image"] == ["0.png"] for record in records[1:])


def test_a_card_beside_data_is_no_text_to_learn(tmp_path):
    (tmp_path / "README.md").write_text("# A card")
    (tmp_path / "data").mkdir()
    table = pyarrow.table({"text": [f"text {i}" for i in range(30)]})
    parquet.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    texts = read_own_texts(TextDataConfig(path=str(tmp_path), held_out=0.0))
    assert len(texts.splits["train"]) == 30


@pytest.mark.parametrize(
    "fields",
    [
        {"columns": {"numbers": ("n", "n")}},
        {"columns": {"answer": 5}},
        {"columns": {"numbers": 5}},
        {"mixture": 5},
        {"mixture": [("a", 1.0)] * 300},
    ],
)
def test_odd_fields_are_named(fields):
    with pytest.raises(ConfigError, match="columns|mixture"):
        columns = ColumnsConfig(**fields.pop("columns", {}))
        DataConfig(columns=columns, **fields)


@pytest.mark.parametrize("change", [{"logprob": 10**400}, {"prompt": "\ud800"}])
def test_odd_answers_are_named(tmp_path, change):
    line = {"view": "v", "scene": 0, "kind": "k", "needs_both": False, "prompt": "p"}
    line |= {"expected": "a", "predicted": "b", "logprob": -1.0, "references": ["a"], "place": ""}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n")
    [answer] = read_answers(tmp_path / "answers.jsonl")  # as version 0.27 wrote it
    assert answer.record is None and answer.number == 0
    (tmp_path / "answers.jsonl").write_text(json.dumps({**line, **change}) + "\n")
    with pytest.raises(InputError, match="answers.jsonl"):
        read_answers(tmp_path / "answers.jsonl")


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("history", [1]),
        ("history", [{"first": -1, "offset": 0, "number": 0, "changes": {}}]),
        ("history", [{"first": 1, "offset": 1.5, "number": 0, "changes": {}}]),
        ("history", [{"first": 1, "offset": 0, "number": 0, "changes": {"a": 3}}]),
        ("data", {"rows": 5}),
        ("data", {"rows": {"train": "x"}}),
    ],
)
def test_an_odd_history_is_a_damaged_checkpoint(tmp_path, item, value):
    with Checkpoints(tmp_path) as checkpoints:
        state = {"x": np.zeros(2)}
        checkpoints.save(1, state, config={}, tokenizer="", metrics={}, **{item: value})
    with pytest.raises(CheckpointError, match=f"{item}.json has"):
        read_saved(checkpoints, 1)
