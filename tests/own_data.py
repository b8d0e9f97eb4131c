"""Thirty rows in each format that users have: a red or a green picture, and its colour."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds
from PIL import Image

COUNT = 30
PROMPT = "which colour?"


def answer(i: int) -> str:
    return ("red", "green")[i % 2]


def split(i: int) -> str:
    """Ten rows of each split."""
    return ("train", "validation", "test")[i // 10]


def png(i: int) -> bytes:
    """A picture that no other row has."""
    pixels = np.zeros((12, 12, 3), np.uint8)
    pixels[..., i % 2] = 150 + i
    pixels[0, 0] = i
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pictures(folder: Path, numbers: Any = range(COUNT)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        (folder / f"{i}.png").write_bytes(png(i))


def rows(numbers: Any = range(COUNT), **names: str) -> list[dict[str, Any]]:
    """Rows of a table; names: ours -> the name of the column."""
    keys = {name: names.get(name, name) for name in ("image", "prompt", "answer")}
    values = ({"image": f"{i}.png", "prompt": PROMPT, "answer": answer(i)} for i in numbers)
    return [{keys[name]: value for name, value in each.items()} for each in values]


def write_csv(file: Path, table: list[dict[str, Any]], delimiter: str = ",") -> None:
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(table[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(table)


def write_jsonl(file: Path, table: list[dict[str, Any]]) -> None:
    file.write_text("\n".join(map(json.dumps, table)))


def jsonl(folder: Path) -> None:
    pictures(folder)
    write_jsonl(folder / "data.jsonl", rows())


def csv_table(folder: Path) -> None:
    pictures(folder)
    write_csv(folder / "data.csv", rows())


def tsv_table(folder: Path) -> None:
    pictures(folder)
    write_csv(folder / "data.tsv", rows(), "\t")


def json_array(folder: Path) -> None:
    pictures(folder)
    (folder / "data.json").write_text(json.dumps(rows(), indent=2))


def tables_by_split(folder: Path) -> None:
    pictures(folder)
    write_csv(folder / "train.csv", rows(range(20)))
    write_csv(folder / "test.csv", rows(range(20, 30)))


def own_names(folder: Path) -> None:
    pictures(folder)
    write_jsonl(folder / "data.jsonl", rows(prompt="question", answer="reply", image="photo"))


def image_folder(folder: Path) -> None:
    for i in range(COUNT):
        pictures(folder / split(i), [i])
    for name in ("train", "validation", "test"):
        table = [
            {"file_name": f"{i}.png", "question": PROMPT, "text": answer(i)}
            for i in range(COUNT)
            if split(i) == name
        ]
        write_jsonl(folder / name / "metadata.jsonl", table)


def class_folders(folder: Path) -> None:
    for i in range(COUNT):
        pictures(folder / answer(i), [i])


def conversations(folder: Path) -> None:
    pictures(folder)
    turns = [
        {
            "id": str(i),
            "image": f"{i}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{PROMPT}"},
                {"from": "gpt", "value": answer(i)},
                {"from": "human", "value": "sure?"},
                {"from": "gpt", "value": "yes"},
            ],
        }
        for i in range(COUNT)
    ]
    (folder / "llava.json").write_text(json.dumps(turns, indent=1))


def arrow_table(numbers: Any = range(COUNT)) -> Any:
    """As the hub stores pictures and classes: bytes and path, numbers and their names."""
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    label = {"names": ["red", "green"], "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    schema = pyarrow.schema(
        [("image", picture), ("question", pyarrow.string()), ("label", pyarrow.int64())],
        metadata={"huggingface": json.dumps(info)},
    )
    columns = [
        [{"bytes": png(i), "path": f"{i}.png"} for i in numbers],
        [PROMPT for _ in numbers],
        [i % 2 for i in numbers],
    ]
    arrays = [pyarrow.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)]
    return pyarrow.Table.from_arrays(arrays, schema=schema)


def parquet(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    for start, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test")):
        table = arrow_table(range(10 * start, 10 * start + 10))
        pyarrow.parquet.write_table(table, folder / "data" / f"{name}.parquet", row_group_size=4)


def saved_dataset(folder: Path) -> None:
    """The files that `DatasetDict.save_to_disk` writes."""
    folder.mkdir(parents=True)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    for name, numbers in (("train", range(20)), ("test", range(20, 30))):
        (folder / name).mkdir()
        file = "data-00000-of-00001.arrow"
        state = {"_data_files": [{"filename": file}], "_split": name}
        (folder / name / "state.json").write_text(json.dumps(state))
        (folder / name / "dataset_info.json").write_text("{}")
        table = arrow_table(numbers)
        with pyarrow.ipc.new_stream(folder / name / file, table.schema) as stream:
            for batch in table.to_batches(max_chunksize=3):
                stream.write_batch(batch)


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def web_dataset(folder: Path) -> None:
    folder.mkdir(parents=True)
    for start, name in enumerate(("train-0000", "train-0001", "test-0000")):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in range(10 * start, 10 * start + 10):
                add_file(tar, f"{i:04}.png", png(i))
                add_file(tar, f"{i:04}.json", json.dumps({"question": PROMPT}).encode())
                add_file(tar, f"{i:04}.cls", answer(i).encode())


FORMATS = {
    "jsonl": jsonl,
    "csv": csv_table,
    "tsv": tsv_table,
    "json": json_array,
    "splits": tables_by_split,
    "names": own_names,
    "hub": image_folder,
    "classes": class_folders,
    "llava": conversations,
    "parquet": parquet,
    "saved": saved_dataset,
    "shards": web_dataset,
}
"""The functions that write each format into a new folder."""


class Colours(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set of TFDS with a picture, a question and a class."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(12, 12, 3)),
            "question": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["red", "green"]),
            "id": np.int64,
            "said": tfds.features.Sequence({"by": np.int64, "text": tfds.features.Text()}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(range(20)),
            "test": self._generate_examples(range(20, 30)),
        }

    def _generate_examples(self, numbers):
        for i in numbers:
            said = [{"by": j, "text": f" {answer(i)} {j}"} for j in range(2)]
            picture = io.BytesIO(png(i))
            question = {"question": PROMPT, "label": i % 2, "id": i, "said": said}
            yield i, {"image": picture, **question}


def build_colours(folder: Path) -> None:
    """Builds `Colours` as TFDS does, for `data.data_dir`."""
    made: Any = Colours(data_dir=folder, file_format="array_record")
    made.download_and_prepare()
