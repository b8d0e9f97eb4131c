"""Public data sets through TFDS: the digits of MNIST, the captions of COCO, sets of texts.

TFDS builds them with TensorFlow. Once built they are read without it.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import requests
import tensorflow_datasets as tfds

from slam_jax.data.built import build_once, open_splits
from slam_jax.data.config import DataConfig
from slam_jax.data.folder import SPLITS
from slam_jax.data.records import DataError
from slam_jax.data.rows import Row, Texts
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.errors import InputError, first_line

MNIST_TEXTS = tuple(Texts("", "digit", str(digit)) for digit in range(10))
_CAPTION = "caption"


@dataclasses.dataclass(frozen=True)
class Made(Sequence[Any]):
    """Rows that are made of records one by one, when asked for; indexing raises what `make` does.

    records: random access to what `make` takes.
    """

    records: Sequence[Any]
    make: Callable[[Any], Row]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.make(self.records[index])


def read_mnist(config: DataConfig) -> dict[str, Made]:
    """Rows by split: 60,000 pictures for training, the last 5,000 of which are the validation
    split, and 10,000 for testing. The prompt is "digit", the answer is the label.

    Source: LeCun, Cortes and Burges 1998. Raises DataError where they can neither be read nor
    built.
    """
    opened = _open(config, "mnist", ("train[:-5000]", "train[-5000:]", "test"))
    return {split: Made(each, _digit) for split, each in zip(SPLITS, opened, strict=True)}


def read_captions(config: DataConfig) -> dict[str, Made]:
    """Rows by split: 82,783 pictures for training, 5,000 for validation, 5,000 for testing, each
    with all its captions (mostly five) as answers to the prompt "caption".

    The splits are those of Karpathy and Li 2015 over COCO 2014; their `restval` is left out.
    Raises DataError where they can neither be read nor built.
    """
    opened = _open(config, "coco_captions/2014", ("train", "val", "test"))
    return {split: Made(each, _captioned) for split, each in zip(SPLITS, opened, strict=True)}


def read_texts(name: str) -> list[str]:
    """The texts of the training split of a TFDS text set, such as "ag_news_subset", in its order.

    Raises DataError where it can neither be read nor built, or its records have no text.
    """
    (records,) = _open(DataConfig(name=name), name, ("train",), pictures=False)
    texts = [_text(records[i], name) for i in range(len(records))]
    return [text.decode(errors="replace") if isinstance(text, bytes) else text for text in texts]


def _text(record: Mapping[str, Any], name: str) -> str | bytes:
    """What the record has under "text", or else its longest text."""
    found = {key: value for key, value in record.items() if isinstance(value, (str, bytes))}
    if not found:
        raise DataError(f"{name} has {', '.join(record)}, none of which is text; give another set")
    return found.get("text") or max(found.values(), key=len)


def with_fitting_answers(rows: Sequence[Any], tokenizer: Tokenizer, context_length: int) -> Made:
    """The rows with those answers alone that fit into a model's context, prompt, <bos> and <eos>
    beside them. Indexing raises InputError for a row that none of its answers fits."""

    def fit(row: Row) -> Row:
        room = context_length - 2 - len(tokenizer.encode(row.prompt))
        answers = tuple(text for text in row.answers if len(tokenizer.encode(text)) <= room)
        if not answers:
            raise InputError(
                f"{row.where}: none of its {len(row.answers)} answers has at most {room} tokens; "
                f"model.context_length is {context_length}"
            )
        return row._replace(answers=answers)

    return Made(rows, fit)


def _digit(record: Mapping[str, Any]) -> Row:
    return Row(record["image"], None, None, MNIST_TEXTS[0].prompt, (str(record["label"]),))


def _captioned(record: Mapping[str, Any]) -> Row:
    texts = (text.decode().strip() for text in record["captions"]["text"])
    captions = tuple(text for text in texts if text)
    where = record["image/filename"].decode()
    if not captions:
        raise InputError(f"{where}: it has no caption")
    return Row(record["image"], None, None, _CAPTION, captions, where=where)


def _open(
    config: DataConfig, name: str, splits: Sequence[str], *, pictures: bool = True
) -> list[Sequence[Any]]:
    folder = config.directory / name
    if not any(folder.glob("[0-9]*/dataset_info.json")):
        _build(config, name)
    if not any(folder.glob("[0-9]*/*.array_record*")):
        raise DataError(
            f"{folder} has no array_record files, and others cannot be read by index; "
            "have TFDS build it with file_format='array_record'"
        )
    # With a version, any, TFDS asks the files alone; its code for COCO imports TensorFlow.
    return open_splits(config, f"{name}:*.*.*", splits, pictures=pictures)


def _build(config: DataConfig, name: str) -> None:
    folder = config.directory / name
    copied = "copy it from where TFDS built it with file_format='array_record'"
    # TFDS would notice after the download, or say much more.
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"{folder} is not there, and TFDS needs TensorFlow to build it: "
            f"`pip install tensorflow`, which nothing else needs, or {copied}"
        )
    try:
        build_once(config, functools.partial(tfds.builder, name))
    except DataError as error:
        if isinstance(error.__cause__, requests.RequestException):
            reason = first_line(error.__cause__)
            raise DataError(
                f"{folder} could not be downloaded ({reason}); check the network, or {copied}"
            ) from error
        raise
