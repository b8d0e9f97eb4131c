"""Details of the readers of formats, and what they refuse."""

import builtins
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from own_data import add_file, arrow_table, png, saved_dataset, web_dataset, write_csv, write_jsonl
from test_folder import MODEL, config, picture, texts_and_answers, write

from slam_jax.data import ColumnsConfig, DataConfig, prepare, training_batches
from slam_jax.data import tables as tables_module
from slam_jax.data.folder import SPLITS, read_table
from slam_jax.data.formats import arrow as arrow_module
from slam_jax.data.formats import parquet as parquet_module
from slam_jax.data.formats import shards
from slam_jax.data.records import DataError
from slam_jax.errors import ConfigError, InputError

TEXTS = [{"text": f"t{i}", "answer": "a"} for i in range(12)]


def every(table: Any) -> list[Any]:
    return [row for rows in table.rows.values() for row in rows]


# --- Columns


def test_columns_are_read_by_the_names_of_the_config(tmp_path):
    rows = [
        {
            "q": f"why {i}?",
            "text": f"t{i}",
            "prompt": "old",
            "said": "a",
            "w": i,
            "age": i,
            "no": "x",
        }
        for i in range(12)
    ]
    write_csv(tmp_path / "data.csv", rows)
    names = ColumnsConfig(prompt="q", answer="said", numbers=("age",))
    table = read_table(tmp_path, names=names)
    assert {row.prompt for row in every(table)} == {f"why {i}?" for i in range(12)}
    assert texts_and_answers(table) == {(f"t{i}", "a") for i in range(12)}
    assert table.columns == ("age",) and table.ignored == ("prompt", "w", "no")
    assert dict(table.read) == {"prompt": "q", "answer": "said", "text": "text"}
    assert read_table(tmp_path, names=ColumnsConfig(answer="said", numbers=())).columns == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"prompt": "tex"}, "data.columns.prompt: .* has no column 'tex'; did you mean 'text'?"),
        ({"numbers": ["w"]}, "data.columns.numbers: .* has no column 'w'; it has text, answer"),
        ({"numbers": ["text"]}, "data.columns.numbers has 'text', which is read as another input"),
        ({"prompt": "text", "image": "text"}, "columns is .*; expected each column once"),
    ],
)
def test_a_column_that_is_not_there_is_named(names, message, tmp_path):
    write_jsonl(tmp_path / "data.jsonl", TEXTS)
    with pytest.raises(ConfigError, match=message):
        read_table(tmp_path, names=ColumnsConfig(**names))


def test_usual_names_of_the_hub_count_in_its_formats_alone(tmp_path):
    rows = [
        {"question": "q?", "text": f"t{i}", "label": i % 2, "question_id": i} for i in range(12)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    table = read_table(tmp_path)
    assert dict(table.read) == {"prompt": "question", "answer": "label", "text": "text"}
    assert table.ignored == ("question_id",) and table.columns == ()
    assert "'question_id' (numbers)" in table.notes[0]
    write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match=r"no column 'answer'; .* or with data.columns.answer"):
        read_table(tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    "cell",
    [
        {"answer": ["cat ", "a cat"]},
        {"answers": ["cat", "a cat"]},
        {"answers": [{"answer": "cat", "answer_id": 1}, {"answer": "a cat"}]},
        {"answers": json.dumps(["cat", "a cat", ""])},
        {"answers": {"text": ["cat", "a cat"], "answer_start": [1, 2]}},
    ],
)
def test_a_row_has_all_of_its_answers(cell, tmp_path):
    write_jsonl(tmp_path / "data.jsonl", [{"text": f"t{i}", **cell} for i in range(12)])
    table = read_table(tmp_path)
    assert {row.answers for row in every(table)} == {("cat", "a cat")} and not table.bad


def test_the_longest_answer_decides_whether_a_row_fits(tmp_path):
    model = MODEL.__class__(vocab_size=1, context_length=20, image=MODEL.image)
    rows = [{"text": f"t{i}", "answer": ["abcdefghi", "jklmnopqr"]} for i in range(12)]
    write_jsonl(
        tmp_path / "data.jsonl",
        [*rows, {"text": "l", "answer": ["a", "bc" * 15], "split": "train"}],
    )
    dataset = prepare(config(tmp_path, max_damaged_records=1, vocab_size=259), model=model)
    assert dataset.table is not None and dataset.table.bad == (
        (13, "prompt and answer: 32 tokens; model.context_length is 20"),
    )
    assert dataset.train.question_length(dataset.tokenizer) == 9
    seen = {
        dataset.train.render(dataset.train[0], "all", np.random.default_rng(i)).answers[0]
        for i in range(20)
    }
    assert seen == {"abcdefghi", "jklmnopqr"}


# --- Several pictures


def test_rows_that_share_one_of_several_pictures_are_in_one_split(tmp_path):
    names = [picture(tmp_path, f"{i}.png", (8 * i, 0, 0)) for i in range(24)]
    pairs = [names[i : i + 2] for i in range(0, 24, 2)]
    rows = [{"image": pair, "answer": "a"} for pair in pairs]
    rows += [{"images": pair[::-1], "answer": "b"} for pair in pairs]
    rows += [{"image": pair[1], "answer": "c"} for pair in pairs]
    rows = [{"image": each.pop("images", each.get("image")), **each} for each in rows]
    table = read_table(write(tmp_path, rows))
    split_of = {}
    for split, found in table.rows.items():
        for row in found:
            shown = row.image if isinstance(row.image, tuple) else (row.image,)
            for each in shown:
                assert split_of.setdefault(each, split) == split
    assert len(split_of) == 24 and all(table.rows.values()) and not table.shared
    first = next(row for row in every(table) if row.where.endswith("row 1"))
    assert first.image == (tmp_path / "0.png", tmp_path / "1.png")
    with pytest.raises(
        DataError, match=r"row \d+: image: 2 pictures; the model reads at most model.im"
    ):
        prepare(config(tmp_path), model=MODEL)


def test_a_list_of_one_picture_is_one(tmp_path):
    names = [picture(tmp_path, f"{i}.png", (8 * i, 0, 0)) for i in range(12)]
    table = read_table(write(tmp_path, [{"images": [name], "answer": "a"} for name in names]))
    assert {row.image for row in every(table)} == {tmp_path / name for name in names}


# --- Splits


def test_missing_splits_are_made_of_training_rows(tmp_path):
    rows = [{"text": f"t{i}", "answer": "a"} for i in range(60)]
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "test.csv", rows[:3])
    table = read_table(tmp_path)
    assert table.made == ("validation",) and table.shared == 3
    hashed = read_table(tmp_path / "train.csv").rows["validation"]
    assert [r.text for r in table.rows["validation"]] == [r.text for r in hashed]
    assert len(table.rows["train"]) + len(table.rows["validation"]) == 60
    (tmp_path / "test.csv").unlink()
    write_csv(tmp_path / "dev.csv", [{"text": "other", "answer": "a"}])
    table = read_table(tmp_path)
    assert table.made == ("test",) and [r.text for r in table.rows["validation"]] == ["other"]


def test_rows_for_test_alone_are_enough_for_a_checkpoint(tmp_path):
    folder = write(tmp_path / "train", TEXTS)
    trained = prepare(config(folder), model=MODEL)
    alone = write(tmp_path / "test", [{**row, "split": "test"} for row in TEXTS])
    dataset = prepare(config(alone), trained.tokenizer, model=MODEL)
    assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [0, 0, 12]
    assert list(dataset.train.answers()) == []
    with pytest.raises(DataError, match="no row is for train"):
        prepare(config(alone), model=MODEL)


# --- JSON


def test_an_array_is_read_element_by_element(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "_CHUNK", 7)
    rows = [{"text": f'"]{i},\n[', "answer": "a", "more": [1, {"b": None}]} for i in range(20)]
    for indent in (None, 1):
        (tmp_path / "data.json").write_text("\n \n" + json.dumps([*rows, 3], indent=indent) + "\n")
        found = list(tables_module.read_records(tmp_path / "data.json"))
        assert [record for _, record in found[:-1]] == rows
        assert found[-1][1] == 'a int; expected an object such as {"answer": "yes"}'
        lines = [line for line, _ in found]
        assert lines == [3] * 21 if indent is None else lines[:3] == [4, 14, 24]
    (tmp_path / "data.json").write_text("[ ]")
    assert not list(tables_module.read_records(tmp_path / "data.json"))


def test_an_element_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "_CHUNK", 16)
    monkeypatch.setattr(tables_module, "_MOST_ELEMENT", 1_000)
    (tmp_path / "data.json").write_text('[{"text": "' + "x" * 100_000)
    reads: list[int] = []

    def largest(*sizes):
        reads.append(max(sizes))
        return max(sizes)

    monkeypatch.setattr(tables_module, "max", largest, raising=False)
    with pytest.raises(DataError, match="the element of the array in line 1 is no JSON"):
        list(tables_module.read_records(tmp_path / "data.json"))
    assert sum(reads) < 5_000


# --- Conversations


def test_turns_become_rows_with_the_conversation_before_them(tmp_path):
    turns = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "<image>\nfirst?"},
        {"from": "gpt", "value": "one"},
        {"from": "human", "value": "second?\n<image>"},
        {"from": "gpt", "value": "two"},
    ]
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "third?"}]},
        {"role": "assistant", "content": "three"},
    ]
    names = [picture(tmp_path, f"{i}.png", (i, 0, 0)) for i in range(6)]
    records: list[Any] = [{"image": name, "conversations": turns} for name in names]
    records += [{"images": ["0.png"], "messages": chat}]
    records += [{"image": "0.png", "conversations": [{"from": "x"}]}]
    write_jsonl(tmp_path / "chat.jsonl", records)
    table = read_table(tmp_path)
    assert {(row.prompt, row.answers) for row in every(table)} == {
        ("be brief\nfirst?", ("one",)),
        ("be brief\nfirst?\none\nsecond?", ("two",)),
        ("third?", ("three",)),
    }
    assert [reason for _, reason in table.bad] == ["a turn of 'x'; expected human or gpt"]
    assert table.format == "conversations, JSONL table" and not table.shared


# --- Paths


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../secret.png"])
def test_no_path_of_a_format_of_others_leaves_the_folder(path, tmp_path):
    folder = tmp_path / "own"
    names = [picture(folder, f"{i}.png", (i, 0, 0)) for i in range(9)]
    picture(tmp_path, "secret.png")
    rows = [{"file_name": name, "text": "a"} for name in [*names, path]]
    write_jsonl(folder / "metadata.jsonl", rows)
    [(line, reason)] = read_table(folder).bad
    assert line == 10 and "leads out of the folder" in reason
    (folder / "metadata.jsonl").unlink()
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = [{"image": name, "conversations": turns} for name in [*names, path]]
    (folder / "llava.json").write_text(json.dumps(records))
    assert "leads out of the folder" in read_table(folder).bad[0].reason
    (folder / "llava.json").unlink()
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    values = [{"bytes": None, "path": name} for name in [*names, path]]
    columns = {"image": pyarrow.array(values, type=kind), "label": pyarrow.array(["a"] * 10)}
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    table = read_table(folder)
    assert len(every(table)) == 9 and "leads out of the folder" in table.bad[0].reason


# --- Parquet and Arrow


def test_a_row_group_is_read_once_and_few_are_kept(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(arrow_table(), file, row_group_size=5)
    groups: Any = parquet_module._Groups()
    monkeypatch.setattr(parquet_module, "_GROUPS", groups)
    read: list[int] = []
    check = parquet_module._check_group
    monkeypatch.setattr(
        parquet_module, "_check_group", lambda f, o, g: (read.append(g), check(f, o, g))[1]
    )
    monkeypatch.setattr(parquet_module, "_KEPT_BYTES", 1_500)
    found: list[Any] = list(parquet_module.read_file(file))
    assert read == list(range(6)) and not groups._kept, "pictures are not read with the texts"
    pictures = [each.record["image"] for each in found]
    read.clear()
    assert [each.read_bytes() for each in pictures] == [png(i) for i in range(30)]
    assert read == list(range(6)) and len(groups._kept) < 6
    assert pictures[0].read_bytes() == png(0) and read[-1] == 0


def test_pictures_of_lists_and_nulls_are_read(tmp_path):
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    values = [[{"bytes": png(i), "path": None}] for i in range(12)]
    columns = {
        "images": pyarrow.array([*values, None, []], type=pyarrow.list_(kind)),
        "label": pyarrow.array(["a"] * 14),
    }
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = read_table(tmp_path)
    assert {row.image.read_bytes() for row in every(found)} == {png(i) for i in range(12)}
    assert [line for line, _ in found.bad] == [13, 14]
    assert "nothing to answer from" in found.bad[0].reason


def test_equal_pictures_of_a_file_are_in_one_split(tmp_path):
    rows = arrow_table([i // 3 for i in range(60)])
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet", row_group_size=7)
    table = read_table(tmp_path)
    pictures = [{row.image.read_bytes() for row in table.rows[split]} for split in SPLITS]
    assert sum(map(len, pictures)) == 20 == len(set.union(*pictures)) and not table.shared


def test_a_damaged_or_missing_part_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="a.parquet is no Parquet file"):
        read_table(tmp_path / "a.parquet")
    saved_dataset(tmp_path / "saved")
    state = tmp_path / "saved" / "train" / "state.json"
    for name in ("../../a.parquet", "/etc/passwd", "..", None):
        state.write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match=r"state.json names no files of the folder"):
            read_table(tmp_path / "saved")
    state.write_text(json.dumps({"_data_files": [{"filename": "no.arrow"}]}))
    with pytest.raises(DataError, match=r"no.arrow is missing; save the data set again"):
        read_table(tmp_path / "saved")
    state.write_text(json.dumps({"_data_files": [{"filename": "state.json"}]}))
    with pytest.raises(DataError, match=r"state.json is no Arrow file"):
        read_table(tmp_path / "saved")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["../x"]}')
    with pytest.raises(DataError, match="dataset_dict.json names no splits"):
        read_table(tmp_path / "saved")


def test_values_that_rows_share_are_not_repeated_in_memory(tmp_path, monkeypatch):
    """A Parquet file of 33 kB holds each value once; the 500 rows have 2 MB a column."""
    file, large = tmp_path / "a.parquet", b"\x89PNG" + b"x" * 4_000
    columns = {"text": [large.decode("latin-1")] * 500, "image": [large] * 500}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    assert file.stat().st_size < 50_000
    monkeypatch.setattr(parquet_module, "_MOST_BATCH_BYTES", 50_000)
    opened = parquet_module._open(file)
    batches = list(parquet_module._batches(opened, 0, ["text"]))
    assert sum(batch.num_rows for batch in batches) == 500
    assert max(batch.nbytes for batch in batches) <= 50_000
    picture = parquet_module.ParquetPicture(str(file), 0, 499, "image")
    assert picture.read_bytes() == large
    monkeypatch.setattr(parquet_module, "_GROUPS", parquet_module._Groups())
    monkeypatch.setattr(parquet_module, "_MOST_GROUP_BYTES", 200_000)
    with pytest.raises(DataError, match="row group 0 has more than 200,000 bytes"):
        picture.read_bytes()


def test_rows_of_no_bytes_are_refused(tmp_path):
    rows = pyarrow.nulls(1_000_001)
    table = pyarrow.table({"text": rows, "answer": rows})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    write_arrow(tmp_path / "saved", table)
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        with pytest.raises(DataError, match=r"1,000,001 rows in [\d,]+ bytes; more than 1,000,000"):
            read_table(path)


@pytest.mark.parametrize("writer", ["new_stream", "new_file"])
def test_arrow_files_are_read_unless_they_are_compressed(tmp_path, writer):
    table = arrow_table()
    table = table.append_column("kind", pyarrow.array(["a", "b"] * 15).dictionary_encode())
    write_arrow(tmp_path / "plain", table, writer)
    assert len(every(read_table(tmp_path / "plain"))) == 30
    write_arrow(tmp_path / "packed", table, writer, compression="zstd")
    with pytest.raises(DataError, match=r"data.arrow is compressed; save it without compression"):
        read_table(tmp_path / "packed")


def test_few_rows_of_arrow_are_read_at_once_where_they_share_values():
    text = pyarrow.schema({"a": pyarrow.string(), "b": pyarrow.list_(pyarrow.int64())})
    assert arrow_module._rows_at_once(text, 1 << 40) == 1_024
    for kind in (
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
        pyarrow.list_(pyarrow.dictionary(pyarrow.int8(), pyarrow.string())),
        pyarrow.run_end_encoded(pyarrow.int32(), pyarrow.string()),
        pyarrow.string_view(),
    ):
        shared = text.append(pyarrow.field("c", kind))
        assert arrow_module._rows_at_once(shared, 1 << 26) == 4
        assert arrow_module._rows_at_once(shared, 1_000) == 1_024


def write_arrow(folder: Path, table: Any, writer: str = "new_stream", **options: Any) -> None:
    folder.mkdir()
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    given = pyarrow.ipc.IpcWriteOptions(**options)
    with getattr(pyarrow.ipc, writer)(folder / "data.arrow", table.schema, options=given) as file:
        file.write_table(table)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(arrow_table(), tmp_path / "a.parquet")
    plain = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"not installed: `pip install 'slam_jax\[parquet\]'`"):
        read_table(tmp_path)


# --- Tar shards


def test_the_headers_of_a_shard_are_read_once_and_nothing_between_them(tmp_path, monkeypatch):
    web_dataset(tmp_path / "own")
    big = tmp_path / "own" / "train-0001.tar"
    with tarfile.open(big, "a") as tar:
        add_file(tar, "big.png", png(1) + bytes(1 << 20))
        add_file(tar, "big.json", b'{"question": "big?"}')
        add_file(tar, "big.cls", b"red")
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda f, n, at: (read.append(n), pread(f, n, at))[1])
    index = shards.index_of(big, tmp_path / "cache")
    assert set(read) == {512} and len(read) == len(index) + 1
    read.clear()
    assert shards.index_of(big, tmp_path / "cache") == index and not read
    table = read_table(tmp_path / "own", cache=tmp_path / "cache")
    assert sum(read) < 50_000, "texts are read, and no picture"
    [row] = [row for row in every(table) if row.prompt == "big?"]
    assert row.image.read_bytes()[:10] == png(1)[:10] and row.image.size == len(png(1)) + (1 << 20)
    for kept in (tmp_path / "cache").iterdir():
        kept.write_text("damaged")
    assert shards.index_of(big, tmp_path / "cache") == index
    with tarfile.open(big, "a") as tar:
        add_file(tar, "next.cls", b"red")
    assert len(shards.index_of(big, tmp_path / "cache")) == len(index) + 1


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_and_kinds_of_tar_files_are_those_of_tarfile(form, tmp_path):
    file = tmp_path / "a.tar"
    long = "x" * 90 + "/" + "é" * 20 if form == tarfile.USTAR_FORMAT else "y" * 300
    with tarfile.open(file, "w", format=form) as tar:
        tar.add(tmp_path, "folder", recursive=False)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("a.png", long, "b.c.json"):
            add_file(tar, name, name.encode() * 40)
    with tarfile.open(file) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert [tuple(each) for each in shards.index_of(file)] == expected and len(expected) == 3


@pytest.mark.slow
def test_ten_gigabytes_are_resumed_without_reading_what_came_before(tmp_path, monkeypatch):
    """The pictures are sparse: a small one, and then a megabyte of zeros that takes no room."""
    count, size = 10_000, 1 << 20
    with open(tmp_path / "data-0000.tar", "wb") as file:
        for i in range(count):
            for name, content, length in (
                (f"{i:05}.png", png(i % 100), size),
                (f"{i:05}.json", json.dumps({"prompt": "?", "answer": f"{i % 7}"}).encode(), None),
            ):
                header = tarfile.TarInfo(name)
                header.size = length or len(content)
                file.write(header.tobuf())
                start = file.tell()
                file.write(content)
                file.seek(start + -(-header.size // 512) * 512)
        file.truncate(file.tell() + 1024)
    assert (tmp_path / "data-0000.tar").stat().st_size > 10e9
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda f, n, at: (read.append(n), pread(f, n, at))[1])
    stages = ((0, {"image": 1.0}),)
    config = DataConfig("folder", path=str(tmp_path), stages=stages, data_dir=str(tmp_path / "c"))
    dataset = prepare(config, model=MODEL)
    assert sum(read) < 25e6, "two headers a row, and its .json"
    read.clear()
    resumed = training_batches(dataset.train, dataset.tokenizer, config, start_step=1_000)
    next(resumed)
    # The prefetched batches are read, too.
    assert sum(read) < 10 * config.batch_size * size < 0.1 * count * size


def test_files_of_one_key_are_a_row(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(12):
            add_file(tar, f"d/{i}.front.PNG", png(i))
            add_file(tar, f"d/{i}.mask.png", png(i + 12))
            add_file(tar, f"d/{i}.json", json.dumps({"question": f"{i}?", "n": i}).encode())
            add_file(tar, f"d/{i}.txt", b" red\n")
            add_file(tar, f"d/.hidden{i}", b"no")
        add_file(tar, "d/bad.json", b"{")
        add_file(tar, "d/list.json", b"[1]")
        add_file(tar, "d/long.txt", b"x" * ((1 << 20) + 1))
        add_file(tar, "../out.cls", b"red")
    table = read_table(tmp_path, names=ColumnsConfig(image="front.png"))
    assert dict(table.read) == {"image": "front.png", "prompt": "question", "answer": "txt"}
    assert {(row.image.read_bytes(), row.prompt, row.answers) for row in every(table)} == {
        (png(i), f"{i}?", ("red",)) for i in range(12)
    }
    assert table.columns == ("n",)
    reasons = [reason for _, reason in table.bad]
    assert "d/bad.json is no json" in reasons[0] and "a list; expected an object" in reasons[1]
    assert "1,048,577 bytes" in reasons[2] and not (tmp_path.parent / "out.cls").exists()


def test_a_tar_that_is_none_is_refused_in_one_line(tmp_path):
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w:gz") as tar:
        add_file(tar, "a.png", png(0) * 20)
    with pytest.raises(DataError, match=r"no tar header at byte 0.* that is not compressed"):
        read_table(file)
    info = tarfile.TarInfo("a.png")
    info.size = 1 << 40
    file.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(512))
    with pytest.raises(DataError, match=r"breaks off in 'a.png'"):
        read_table(file)
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    file.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(512))
    with pytest.raises(DataError, match=r"a name of 8,589,934,592 bytes"):
        read_table(file)
    negative = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    negative[124:136] = b"\xff" * 12
    total = sum(negative[:148]) + 8 * 32 + sum(negative[156:])
    negative[148:156] = b"%06o\0 " % total
    file.write_bytes(bytes(negative) + bytes(512))
    with pytest.raises(DataError, match=r"a file of -1 bytes at byte 0"):
        read_table(file)


def test_a_picture_in_a_file_that_is_too_large_is_refused(tmp_path):
    huge = shards.TarPicture(str(tmp_path / "a.tar"), 0, 1 << 40, "a")
    with pytest.raises(InputError, match="at most 256 MiB are read"):
        huge.read_bytes()


LARGE = """
import sys, time
from slam_jax.data import DataConfig, prepare, training_batches
from slam_jax.slam_v3 import SlamV3Config

start = time.process_time()
model = SlamV3Config(vocab_size=1, aux_dim=8, aux_slots=True, context_length=256)
stages = ((0, {"all": 1.0}),)
config = DataConfig("folder", path=sys.argv[1], stages=stages, table_version=2, vocab_size=2048)
dataset = prepare(config, model=model)
next(training_batches(dataset.train, dataset.tokenizer, config))
# ru_maxrss would be that of the process that started this one.
status = open("/proc/self/status").read()
peak = int(status.split("VmHWM:")[1].split()[0]) / 1e3
print(len(dataset.train), time.process_time() - start, peak)
"""


@pytest.mark.slow
def test_100_000_rows_are_ready_in_a_minute_and_500_megabytes(tmp_path):
    """The time is that of the processor, as others may use it at the same time."""
    words = [f"word{i}" for i in range(3_000)]
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, len(words), (100_000, 20))
    rows = [
        {"text": " ".join(words[j] for j in each), "answer": words[each[0]], "width": float(i % 97)}
        for i, each in enumerate(chosen)
    ]
    write_csv(tmp_path / "data.csv", rows)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", LARGE, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    count, seconds, megabytes = map(float, ended.stdout.split())
    assert count > 79_000 and seconds < 60 and megabytes < 500
