"""Numbers with a name, as auxiliary vectors."""

import csv
import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from slam_jax.errors import InputError, check_names, first_line, shorten

_MOST_DEVIATIONS = 8.0
_OUTLIER_RANGES = 10.0
_LARGEST = 1e30  # of a number that a model reads as it is; sums of larger ones are infinite
_MOST_BYTES = 1 << 24  # of a file of numbers; it is read whole

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_LONGEST = 400  # letters of a number
_MISSING = ("", "na", "n/a", "nan", "null", "none")
_WORDS = {"true": 1.0, "false": 0.0}


def is_missing(value: Any) -> bool:
    """Whether the value means a missing number: None, NaN, or a text such as "" or "NA"."""
    if isinstance(value, str):
        return value.strip().lower() in _MISSING
    return value is None or value != value


def parse_number(value: Any, *, words: bool = True) -> float | None:
    """A finite number, or None for anything else, such as "1_1", "1,5" and "12%".

    words: whether the texts "true" and "false", in any case, are 1 and 0. Booleans always are.
    """
    if isinstance(value, str):
        value = value.strip()
        if words and value.lower() in _WORDS:
            return _WORDS[value.lower()]
        if len(value) > _LONGEST or not _NUMBER.fullmatch(value):
            return None
    elif not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def find_outliers(numbers: Float[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Which numbers lie more than ten interquartile ranges beyond the quartiles; NaN never does.

    Where half of the numbers are equal, the range is the median distance of the others from them.
    """
    known = numbers[~np.isnan(numbers)]
    if not len(known):
        return np.zeros(len(numbers), bool)
    low, middle, high = np.quantile(known, (0.25, 0.5, 0.75))
    distances = np.abs(known - middle)
    spread = high - low
    if spread == 0 and distances.any():
        spread = np.median(distances[distances > 0])
    reach = _OUTLIER_RANGES * spread
    return (numbers < low - reach) | (numbers > high + reach)


@dataclasses.dataclass(frozen=True)
class AuxFormat:
    """The content of the auxiliary vectors of a data set; saved with every checkpoint.

    Either the vectors are given as the model reads them, and `names` are the names of their
    numbers. Or each column of a table gives one vector, `names` are the names of the columns, and
    `mean` and `scale` (the standard deviation) are computed from the training rows.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        for field, values in (("mean", self.mean), ("scale", self.scale)):
            object.__setattr__(self, field, None if values is None else tuple(values))

    @property
    def has_columns(self) -> bool:
        return self.mean is not None

    @classmethod
    def of_columns(
        cls, names: Sequence[str], rows: Float[np.ndarray, "n A"], *, robust: bool = True
    ) -> "AuxFormat":
        """The format for a table whose training rows are `rows`; NaN = missing.

        robust: mean and scale are computed without outliers (see `find_outliers`), because a single
        outlier would make all other numbers look the same.
        """
        mean, scale = [], []
        for column in rows.T:
            known = column[~np.isnan(column)]
            if robust:
                known = known[~find_outliers(known)]
            mean.append(float(known.mean()) if len(known) else 0.0)
            spread = float(known.std()) if len(known) else 0.0
            # A column that does not change tells nothing, so its scale does not matter.
            scale.append(spread if spread > 1e-12 * max(1.0, abs(mean[-1])) else 1.0)
        return cls(tuple(names), tuple(mean), tuple(scale))

    def encode(self, value: Any, width: int) -> Float[np.ndarray, "A C"]:
        """The auxiliary vectors, `width` numbers each. The vector of a missing number is NaN.

        Args:
          value: rows of `width` numbers; or, for columns, numbers in their order or by name, of
            which some may be missing or None.

        Raises:
          InputError: there is a name that is no column, or other numbers than expected.
        """
        if not self.has_columns:
            return as_vectors(value, width, self.names)
        if isinstance(value, Mapping):
            check_names(map(str, value), self.names, "aux")
            value = [value.get(name) for name in self.names]
        numbers = _as_numbers(value)
        if numbers.ndim == 2 and len(numbers) == 1:  # a table of one row
            numbers = numbers[0]
        if numbers.shape != (len(self.names),):
            raise InputError(
                f"aux is {_shape(numbers)} numbers; expected {len(self.names)}, one for each of "
                f"{', '.join(self.names)}"
            )
        standard = (numbers - np.array(self.mean)) / np.array(self.scale)
        return number_features(standard, width)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AuxFormat":
        """Raises InputError for what `to_json` did not make."""
        try:
            made = cls(**value)
        except TypeError as error:
            raise InputError(f"aux format: {error}") from None
        if not all(isinstance(name, str) for name in made.names):
            raise InputError("aux format: expected texts as names")
        numbers = (*(made.mean or ()), *(made.scale or ()))
        if not all(map(_is_finite, numbers)) or 0 in (made.scale or ()):
            raise InputError("aux format: expected finite numbers as mean and scale, no scale of 0")
        lengths = {len(v) for v in (made.names, made.mean, made.scale) if v is not None}
        if (made.mean is None) != (made.scale is None) or len(lengths) > 1:
            raise InputError("aux format: names, mean and scale are of different lengths")
        return made


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max


def as_vectors(value: Any, width: int, names: Sequence[str] = ()) -> Float[np.ndarray, "A C"]:
    """Rows of numbers as float32; raises InputError for another width."""
    rows = _as_numbers(value)
    if rows.ndim != 2 or rows.shape[-1] != width or not rows.shape[0]:
        of = f" ({', '.join(names)})" if names else ""
        raise InputError(f"aux is {_shape(rows)} numbers; expected rows of {width}{of}")
    if np.isnan(rows).any():
        raise InputError("aux has a number that is missing or no number; leave the row out instead")
    if (np.abs(rows) > _LARGEST).any():
        raise InputError(f"aux has a number beyond {_LARGEST:g}; give smaller ones")
    return rows.astype(np.float32)


def number_features(numbers: Float[np.ndarray, "A"], width: int) -> Float[np.ndarray, "A C"]:
    """Each number, and sines and cosines of it: a linear map can read coarse and fine differences.

    The longest period is 16 standard deviations, and each next one is half as long. Source: the
    Fourier features of Tancik et al. 2020 (arXiv 2006.10739), with fixed octaves.
    """
    clipped = np.clip(numbers, -_MOST_DEVIATIONS, _MOST_DEVIATIONS)
    columns = [clipped / 2]
    for octave in range((width + 1) // 2):
        angle = clipped * (2 * np.pi / 16) * 2**octave
        columns += [np.sin(angle), np.cos(angle)]
    return np.stack(columns[:width], axis=-1).astype(np.float32)


def _as_numbers(value: Any) -> np.ndarray:
    try:
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = [math.nan if each is None else each for each in value]
        numbers = np.asarray(value, np.float64)
    except OverflowError:  # of a whole number
        raise InputError("aux has an infinite number; give finite ones") from None
    except (TypeError, ValueError):
        raise InputError("aux is no table of numbers; expected rows of numbers") from None
    if np.isinf(numbers).any():
        raise InputError("aux has an infinite number; give finite ones")
    return numbers


def _shape(numbers: np.ndarray) -> str:
    return " x ".join(map(str, numbers.shape)) or "1"


def read_numbers(path: str) -> Any:
    """Rows of numbers, or numbers by name, from a JSON or CSV file.

    Raises InputError, naming the file, for a file that holds neither.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has {file.stat().st_size:,} bytes")
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() != ".csv":
            return json.loads(text)
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
        if rows and not all(is_missing(x) or parse_number(x) is not None for x in rows[0]):
            names, *rows = rows
            if len(rows) == 1:
                return dict(zip(names, map(_cell, *rows), strict=True))
        return [[_cell(cell) for cell in row] for row in rows]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(
            f"aux: {path} cannot be read ({first_line(error)}); expected rows of numbers, "
            "as JSON or CSV"
        ) from error


def _cell(cell: str) -> float | None:
    number = parse_number(cell)
    if number is None and not is_missing(cell):
        raise ValueError(f"{shorten(repr(cell), 60)} is no number")
    return number
