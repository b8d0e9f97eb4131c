"""Public data sets: digits of scikit-learn; MNIST, COCO captions and text sets of TFDS."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slam_jax.data.built import open_public
from slam_jax.data.config import DataConfig
from slam_jax.data.hub_tokenizer import AnyTokenizer
from slam_jax.data.records import DataError, Mapped
from slam_jax.data.rows import Row, Texts
from slam_jax.data.splits import SPLITS
from slam_jax.errors import ConfigError, InputError

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digit_texts(words: bool = False) -> tuple[Texts, ...]:
    """The texts of each digit: its number, or with `words` its word."""
    if words:
        return tuple(Texts("", "The digit is", f" {word}") for word in _WORDS)
    return tuple(Texts("", "digit", str(digit)) for digit in range(10))


_DIGITS_SPLIT_ENDS = (1_257, 1_437, 1_797)
_DIGITS_SEED = 1797


def read_digits(words: bool = False) -> dict[str, list[Row]]:
    """The handwritten digits of scikit-learn, 8 x 8 pixels: rows by split, shuffled.

    1,257 rows are for training, 180 for validation and 360 for testing. Prompts and answers are
    those of `digit_texts`. All splits have the same writers. Source: Alpaydin and Kaynak 1998,
    "Optical Recognition of Handwritten Digits" (UCI), test part.

    Raises:
      ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "data.name is 'digits', which scikit-learn has, and it is not installed: "
            "`pip install 'slam_jax[digits]'`"
        ) from None
    images, labels = load_digits(return_X_y=True)
    pixels = (np.asarray(images) * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)
    texts = [digit_texts(words)[label] for label in np.asarray(labels)]
    order = np.random.default_rng(_DIGITS_SEED).permutation(len(pixels))
    rows = [Row(pixels[i], None, None, texts[i].prompt, (texts[i].answer,)) for i in order]
    bounds = zip(SPLITS, (0, *_DIGITS_SPLIT_ENDS), _DIGITS_SPLIT_ENDS, strict=False)
    return {split: rows[start:end] for split, start, end in bounds}


def read_mnist(config: DataConfig) -> dict[str, Mapped]:
    """MNIST: rows by split, with the prompt "digit" and the label as the answer.

    The test split has 10,000 pictures. The last 5,000 of the 60,000 training pictures are the
    validation split. Source: LeCun, Cortes and Burges 1998.

    Raises:
      DataError: the data set can neither be read nor built.
    """

    def digit(record: Mapping[str, Any]) -> Row:
        return Row(record["image"], None, None, "digit", (str(record["label"]),))

    splits = open_public(config, "mnist", ("train[:-5000]", "train[-5000:]", "test"))
    return {split: Mapped(each, digit) for split, each in zip(SPLITS, splits, strict=True)}


def read_captions(config: DataConfig) -> dict[str, Mapped]:
    """COCO captions 2014: rows by split, with the prompt "caption" and every caption as an answer.

    82,783 pictures for training, 5,000 for validation and 5,000 for testing, mostly with five
    captions. The splits are those of Karpathy and Li 2015 without their `restval`.

    Raises:
      DataError: the data set can neither be read nor built.
    """

    def captioned(record: Mapping[str, Any]) -> Row:
        texts = (text.decode().strip() for text in record["captions"]["text"])
        captions = tuple(text for text in texts if text)
        where = record["image/filename"].decode()
        if not captions:
            raise InputError(f"{where}: it has no caption")
        return Row(record["image"], None, None, "caption", captions, where=where)

    splits = open_public(config, "coco_captions/2014", ("train", "val", "test"))
    return {split: Mapped(each, captioned) for split, each in zip(SPLITS, splits, strict=True)}


def with_fitting_answers(
    rows: Sequence[Any], tokenizer: AnyTokenizer, context_length: int
) -> Mapped:
    """The rows without the answers that do not fit into the context with prompt, <bos> and <eos>.

    Indexing raises InputError for a row with no fitting answer, or whose text does not fit.
    """

    def fit(row: Row) -> Row:
        length = 0 if row.text is None else len(tokenizer.encode(row.text))
        if length > context_length:
            raise InputError(
                f"{row.where}: its text has {length:,} tokens; model.context_length is "
                f"{context_length}"
            )
        most = context_length - 2 - len(tokenizer.encode(row.prompt))
        answers = tuple(text for text in row.answers if len(tokenizer.encode(text)) <= most)
        if not answers:
            raise InputError(
                f"{row.where}: none of its {len(row.answers)} answers has at most {most} tokens; "
                f"model.context_length is {context_length}"
            )
        return row._replace(answers=answers)

    return Mapped(rows, fit)


def read_texts(name: str) -> list[str]:
    """The texts of the training split of a TFDS text set, such as "ag_news_subset", in its order.

    The text of a record is its field "text" or, without one, its longest text.

    Raises:
      DataError: the data set can neither be read nor built, or its records have no text.
    """

    def text_of(record: Mapping[str, Any]) -> str:
        texts = {key: value for key, value in record.items() if isinstance(value, (str, bytes))}
        if not texts:
            raise DataError(
                f"{name} has {', '.join(record)}, none of which is text; give another set"
            )
        text = texts.get("text") or max(texts.values(), key=len)
        return text.decode(errors="replace") if isinstance(text, bytes) else text

    (records,) = open_public(DataConfig(name=name), name, ("train",), images=())
    return [text_of(records[i]) for i in range(len(records))]
