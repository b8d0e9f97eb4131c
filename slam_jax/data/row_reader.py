"""Turns records into rows, with a message for each that cannot be used."""

import functools
import hashlib
import json
import math
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from slam_jax.data.columns import Columns
from slam_jax.data.formats.base import MOST_PICTURE_BYTES, Found, Located, StoredPicture
from slam_jax.data.formats.parquet import inside
from slam_jax.data.images import check_image
from slam_jax.data.numbers import is_missing, parse_number
from slam_jax.data.rows import ANY_KIND, Row
from slam_jax.data.splits import SPLIT_NAMES, SPLITS, Read, identity
from slam_jax.data.tables import quote
from slam_jax.data.tokenizer import check_text
from slam_jax.errors import InputError, first_line
from slam_jax.runtime.files import require_file

# A token is rarely longer; training a tokenizer takes time that grows with the square of a word.
_BYTES_PER_TOKEN = 16
_LONGEST_PATH = 1_000
_MOST_ANSWERS = 1_000
_MOST_PICTURES = 64


class RowReader:
    """Turns records into rows. A readable picture is opened once, however many rows show it.

    cleaned: the lines of rows whose answer or kind was changed.
    """

    def __init__(
        self, found: Found, columns: Columns, version: int | None, context_length: int | None
    ):
        self._found, self._columns, self._version = found, columns, version
        self._files = frozenset(found.files)
        self._context_length = context_length
        self._digest = functools.cache(_digest)
        self._same: dict[Any, Any] = {}
        self.cleaned: list[int] = []

    def read(self, located: Located) -> Read:
        """Raises InputError, naming the field, for a record that cannot be used."""
        names = ("text", "prompt", "kind", "split")
        text, prompt, kind, split = (self._text(located, name) for name in names)
        answers = self._answers(located)
        if (known := SPLIT_NAMES.get(split.strip().lower())) is None:
            raise InputError(f"split: {quote(split)} is none of {', '.join(SPLITS)}")
        numbers = self._numbers(located)
        names, pictures = self._pictures(located)
        if pictures:
            contents = tuple(dict.fromkeys(map(self._content, pictures)))
        elif text:
            contents = (identity(json.dumps(text)),)
        elif not np.isnan(numbers).all():
            contents = (identity(json.dumps(numbers.tolist())),)
        else:
            raise InputError("nothing to answer from: give it an image, a text or a number")
        row = Row(
            image=None if not pictures else pictures[0] if len(pictures) == 1 else pictures,
            text=text or None,
            numbers=numbers if self._columns.numbers else None,
            prompt=self._once(prompt),
            answers=self._once(answers),
            kind=self._once(kind or ANY_KIND),
            where=self._where(located),
        )
        by_name = self._version is None and names
        return Read(
            known, contents, identity(json.dumps(names[0])) if by_name else contents[0], row
        )

    def _where(self, located: Located) -> str:
        file = located.file if located.file in self._files else self._found.path
        return f"{file}, row {located.line}"

    def _once(self, value: Any) -> Any:
        """The value, one object for equal ones, of which a table has many."""
        return self._same.setdefault(value, value)

    def _value(self, located: Located, name: str) -> Any:
        column = self._columns.read.get(name)
        assert isinstance(located.record, dict)
        return None if column is None else located.record.get(column)

    def _text(self, located: Located, name: str) -> str:
        return self._clean(located.line, name, self._value(located, name))

    def _clean(self, line: int, name: str, value: Any) -> str:
        if value is None or value != value:  # NaN: how data frames write a missing value
            return ""
        if isinstance(value, (bool, int, float)):
            value = json.dumps(value)
        if isinstance(value, bytes):
            value = _decode(value, name)
        if not isinstance(value, str):
            raise InputError(f"{name}: a {type(value).__name__}; expected a text")
        most, size = _BYTES_PER_TOKEN * (self._context_length or 0), len(value)
        if most and size > most and name in ("text", "prompt", "answer"):
            raise InputError(
                f"{name}: {size:,} letters ({quote(value)}); at most {most:,} are read for "
                f"model.context_length={self._context_length:,}"
            )
        check_text(value, name)
        if self._version is None:
            return value
        if value.lower() in ("true", "false"):  # pandas writes True, JSON true
            return value.lower()
        if name not in ("answer", "kind"):
            return value
        clean = unicodedata.normalize("NFC", value).strip()
        if clean != value and clean and self.cleaned[-1:] != [line]:
            self.cleaned.append(line)
        return clean

    def _answers(self, located: Located) -> tuple[str, ...]:
        """One answer, or those of a list. Texts of people are in a field `answer` in VQA."""
        value = self._value(located, "answer")
        if self._columns.read.get("answer") == "answers":
            value = _from_json(value)
        if isinstance(value, dict):  # {"text": [...], "answer_start": [...]} of SQuAD
            value = value.get("text", value)
        values = value if isinstance(value, (list, tuple)) else [value]
        if len(values) > _MOST_ANSWERS:
            raise InputError(f"answer: {len(values):,} answers; at most {_MOST_ANSWERS:,} are read")
        values = [each.get("answer") if isinstance(each, dict) else each for each in values]
        texts = [self._clean(located.line, "answer", each) for each in values]
        found = tuple(text for text in texts if text.strip())
        if not found:
            raise InputError("answer: it is empty; give every row one")
        return found

    def _pictures(self, located: Located) -> tuple[list[str], tuple[Any, ...]]:
        """The paths as the record has them, and what to read."""
        value = _from_json(self._value(located, "image"))
        values = value if isinstance(value, (list, tuple)) else [value]
        if len(values) > _MOST_PICTURES:
            raise InputError(f"image: {len(values)} pictures; at most {_MOST_PICTURES} are read")
        names, pictures = [], []
        for each in values:
            if isinstance(each, StoredPicture):
                pictures.append(each)
                continue
            path = self._clean(located.line, "image", each)
            if len(path) > _LONGEST_PATH:
                raise InputError(
                    f"image: {quote(path)} is no path; save the picture as a file and give its name"
                )
            if path:
                names.append(path)
                pictures.append(self._path(located.file.parent, path))
            elif len(values) > 1:
                raise InputError("image: one of several is empty; leave it out of the list")
        return names, tuple(pictures)

    def _path(self, folder: Path, name: str) -> Path:
        if self._found.own:
            return folder / name
        try:
            return inside(folder, name)
        except InputError as error:
            raise InputError(f"image: {error}") from None

    def _content(self, picture: Any) -> bytes:
        """An identity of the picture: equal for equal bytes, where these are read."""
        if not self._found.compared and isinstance(picture, StoredPicture):
            return identity(picture.identity)
        return self._digest(picture)

    def _numbers(self, located: Located) -> np.ndarray:
        assert isinstance(located.record, dict)
        numbers = np.full(len(self._columns.numbers), math.nan)
        for i, name in enumerate(self._columns.numbers):
            value = located.record.get(name)
            if is_missing(value):
                continue
            number = parse_number(value, words=self._version is not None)
            if number is None:
                advice = "; write it like 1500 or 1.5" if re.search(r"\d", str(value)) else ""
                raise InputError(f"{name}: {quote(value)} is no finite number{advice}")
            numbers[i] = number
        return numbers


def _decode(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InputError(f"{name}: {len(value):,} bytes that are no UTF-8 text") from None


def _from_json(value: Any) -> Any:
    """The list that a cell of a CSV holds as JSON, such as '["a", "b"]'; else the value itself."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list) else value
    return value


def _digest(image: Path | StoredPicture) -> bytes:
    """An identity of a picture's bytes, once its header was read."""
    try:
        if isinstance(image, Path):
            if image.exists():
                require_file(image, MOST_PICTURE_BYTES)
            check_image(image)
            found = image.read_bytes()
        else:
            found = image.read_bytes()
            check_image(found)
        return identity(hashlib.sha256(found).hexdigest())
    except InputError as error:
        raise InputError(f"image: {error}") from error
    except OSError as error:
        raise InputError(f"image: {image}: {first_line(error)}") from error
