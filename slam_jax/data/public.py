"""Public data sets from TFDS: MNIST, COCO captions, and text sets.

TFDS needs TensorFlow to build them, and nothing to read them once they are built.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from slam_jax.data.built import build_once, open_splits
from slam_jax.data.config import DataConfig
from slam_jax.data.folder import SPLITS
from slam_jax.data.records import DataError
from slam_jax.data.rows import Row, Texts
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.errors import InputError

MNIST_TEXTS = tuple(Texts("", "digit", str(digit)) for digit in range(10))


@dataclasses.dataclass(frozen=True)
class MappedRecords(Sequence[Any]):
    """Records that `convert` is applied to when they are indexed; raises what it raises."""

    records: Sequence[Any]
    convert: Callable[[Any], Row]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.convert(self.records[index])


def read_mnist(config: DataConfig) -> dict[str, MappedRecords]:
    """MNIST: rows by split, with the prompt "digit" and the label as the answer.

    The test split has 10,000 pictures. The last 5,000 of the 60,000 training pictures are the
    validation split. Source: LeCun, Cortes and Burges 1998.

    Raises:
      DataError: the data set can neither be read nor built.
    """
    splits = _open(config, "mnist", ("train[:-5000]", "train[-5000:]", "test"))
    return dict(zip(SPLITS, (MappedRecords(each, _digit) for each in splits), strict=True))


def read_captions(config: DataConfig) -> dict[str, MappedRecords]:
    """COCO captions 2014: rows by split, with the prompt "caption" and every caption as an answer.

    82,783 pictures for training, 5,000 for validation and 5,000 for testing, mostly with five
    captions. The splits are those of Karpathy and Li 2015 without their `restval`.

    Raises:
      DataError: the data set can neither be read nor built.
    """
    splits = _open(config, "coco_captions/2014", ("train", "val", "test"))
    return dict(zip(SPLITS, (MappedRecords(each, _captioned) for each in splits), strict=True))


def read_texts(name: str) -> list[str]:
    """The texts of the training split of a TFDS text set, such as "ag_news_subset", in its order.

    Of each record it is the field "text" or, without one, the longest text.

    Raises:
      DataError: the data set can neither be read nor built, or its records have no text.
    """
    (records,) = _open(DataConfig(name=name), name, ("train",), images=False)
    return [_text(records[i], name) for i in range(len(records))]


def _text(record: Mapping[str, Any], name: str) -> str:
    texts = {key: value for key, value in record.items() if isinstance(value, (str, bytes))}
    if not texts:
        raise DataError(f"{name} has {', '.join(record)}, none of which is text; give another set")
    text = texts.get("text") or max(texts.values(), key=len)
    return text.decode(errors="replace") if isinstance(text, bytes) else text


def with_fitting_answers(
    rows: Sequence[Any], tokenizer: Tokenizer, context_length: int
) -> MappedRecords:
    """The rows without the answers that do not fit into the context with prompt, <bos> and <eos>.

    Indexing raises InputError for a row with no fitting answer.
    """

    def fit(row: Row) -> Row:
        room = context_length - 2 - len(tokenizer.encode(row.prompt))
        answers = tuple(text for text in row.answers if len(tokenizer.encode(text)) <= room)
        if not answers:
            raise InputError(
                f"{row.where}: none of its {len(row.answers)} answers has at most {room} tokens; "
                f"model.context_length is {context_length}"
            )
        return row._replace(answers=answers)

    return MappedRecords(rows, fit)


def _digit(record: Mapping[str, Any]) -> Row:
    return Row(record["image"], None, None, MNIST_TEXTS[0].prompt, (str(record["label"]),))


def _captioned(record: Mapping[str, Any]) -> Row:
    texts = (text.decode().strip() for text in record["captions"]["text"])
    captions = tuple(text for text in texts if text)
    where = record["image/filename"].decode()
    if not captions:
        raise InputError(f"{where}: it has no caption")
    return Row(record["image"], None, None, "caption", captions, where=where)


def _open(
    config: DataConfig, name: str, splits: Sequence[str], *, images: bool = True
) -> list[Sequence[Any]]:
    folder = config.directory / name
    if not any(folder.glob("[0-9]*/dataset_info.json")):
        advice = "copy it from where TFDS built it with file_format='array_record'"
        # Without this check TFDS fails only after the download.
        if importlib.util.find_spec("tensorflow") is None:
            raise DataError(
                f"{folder} is not there, and TFDS needs TensorFlow to build it: "
                f"`pip install tensorflow`, which nothing else needs, or {advice}"
            )
        advice = f"check the network, free space and permissions, or {advice}"
        build_once(config, functools.partial(tfds.builder, name), advice=advice)
    if not any(folder.glob("[0-9]*/*.array_record*")):
        raise DataError(
            f"{folder} has no array_record files, and others cannot be read by index; "
            "have TFDS build it with file_format='array_record'"
        )
    # Given a version, TFDS only reads the files; its code for COCO would import TensorFlow.
    return open_splits(config, f"{name}:*.*.*", splits, images=images)
