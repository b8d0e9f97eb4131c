"""Texts for language models: documents, or prompts with their answers, by split.

A folder of `.txt` and `.md` files gives a document a file; one such file alone gives a document a
paragraph, which blank lines separate. A table (`.jsonl`, `.csv` or `.parquet`)
gives a row a line: with a column `answer` a prompt and its answer, else with a column `text` a
document. A column `split` may say train, validation or test.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from slam_jax.data.formats import find
from slam_jax.data.public import read_texts
from slam_jax.data.records import DataError
from slam_jax.data.splits import SPLIT_NAMES, SPLITS, choose, identity
from slam_jax.data.tables import Record
from slam_jax.data.tokenizer import SMALLEST_VOCABULARY, check_unicode
from slam_jax.errors import ConfigError, InputError, require, require_count, shorten
from slam_jax.runtime.files import read_limited

TFDS = "tfds/"
_OWN = "own"
_FILES = (".txt", ".md")
_TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".tar", ".arrow")
_CARDS = ("readme", "license")
_MOST_BYTES = 1 << 30  # of all texts, which are in memory


@dataclasses.dataclass(frozen=True)
class TextColumns:
    """The names of a table's columns."""

    text: str = "text"
    prompt: str = "prompt"
    answer: str = "answer"
    split: str = "split"


@dataclasses.dataclass(frozen=True)
class TextDataConfig:
    """The texts of a run of a language model.

    name: "own" with `path`; or "tfds/NAME", a text set of TFDS, which is built if necessary.
    path: a folder of texts, or a table, or a folder with one; see `slam_jax.data.texts`.
    columns: the names of a table's columns.
    held_out: the share of documents for validation, and again for testing, chosen by the hash of a
      document (of a row: of its prompt). 0 = all texts train, and scores are about these.
    evaluate: the split that eval.py scores: validation, test, or all.
    batch_size: rows per step over all processes. length: T, the tokens that a row has at most, next
      to its first one. Longer documents are cut; rows with prompts must fit.
    pack: whether a row holds several texts, none of which sees another; None = where the model
      can. Otherwise rows are padded to the longest.
    chat: whether prompts are asked through the chat template of the tokenizer; None = where it has
      one.
    tokenizer: the folder or the file of a tokenizer; None = that of `run.init_from`, or without it
      a new one, which learns at most `vocab_size` tokens from the training split.
    seed: of the order of rows.
    max_damaged_records: how many rows that cannot be used are skipped; one more ends the run.

    Raises ConfigError, naming the field, for a value that cannot be used.
    """

    name: str = _OWN
    path: str | None = None
    columns: TextColumns = TextColumns()
    held_out: float = 0.1
    evaluate: str = "test"
    batch_size: int = 16
    length: int = 256
    pack: bool | None = None
    chat: bool | None = None
    tokenizer: str | None = None
    vocab_size: int = 2_048
    seed: int = 0
    max_damaged_records: int = 10

    def __post_init__(self) -> None:
        known = self.name == _OWN or self.name.startswith(TFDS)
        require(known, "name", self.name, f"{_OWN!r} with data.path, or {TFDS!r} and a name")
        require(0 <= self.held_out < 0.5, "held_out", self.held_out, "a share from 0 to below 0.5")
        splits = ("validation", "test", "all")
        require(self.evaluate in splits, "evaluate", self.evaluate, f"one of {splits}")
        for field in ("batch_size", "length"):
            require_count(field, getattr(self, field))
        require_count("vocab_size", self.vocab_size, least=SMALLEST_VOCABULARY)
        require_count("seed", self.seed, least=0, most=2**32 - 1)
        require_count("max_damaged_records", self.max_damaged_records, least=0)


class Text(NamedTuple):
    """A document, whose prompt is None, or an answer with its prompt.

    where: the file and the row in it. messages: where the prompt is a conversation, its messages.
    """

    text: str
    prompt: str | None = None
    where: str = ""
    messages: tuple[dict[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts by split. place: where they are. notes: what the user should know, one line each."""

    splits: Mapping[str, Sequence[Text]]
    place: str
    notes: tuple[str, ...] = ()

    @property
    def have_answers(self) -> bool:
        return any(each.prompt is not None for texts in self.splits.values() for each in texts)

    @property
    def all(self) -> list[Text]:
        """Every text once."""
        return [each for texts in self.splits.values() for each in texts]


def read_own_texts(config: TextDataConfig) -> Texts:
    """The texts of a configuration, read and split.

    Raises:
      ConfigError: no path is given.
      DataError: the texts cannot be read, there are none, or too many rows cannot be used.
    """
    if config.name.startswith(TFDS):
        place = config.name
        found = [("", Text(text)) for text in read_texts(config.name.removeprefix(TFDS)) if text]
    else:
        if config.path is None:
            raise ConfigError("data.path is not given; give it a folder of texts, or a table")
        place = config.path
        found = _read(Path(config.path), config)
    if not found:
        raise DataError(f"{place} has no texts; give documents, or rows with an answer")
    if len({each.prompt is None for _, each in found}) > 1:
        raise DataError(f"{place} has documents and rows with answers; give two runs one each")
    splits, notes = _split(found, config.held_out)
    return Texts(splits, place, tuple(notes))


def _read(path: Path, config: TextDataConfig) -> list[tuple[str, Text]]:
    """(the given split or "", text) of a folder, or of a table."""
    if not path.exists():
        raise DataError(f"{path}: no such folder or file; give data.path texts, or a table")
    if path.suffix.lower() in _FILES and path.is_file():
        parts = re.split(r"\n\s*\n", _read_file(path, _MOST_BYTES))
        return [("", Text(part.strip("\n"), where=str(path))) for part in parts if part.strip()]
    has_table = any(next(path.rglob(f"[!.]*{suffix}"), None) for suffix in _TABLES)
    texts = [] if has_table else list(_read_files(path))
    # A README beside data in another form is no text to learn.
    if any(not Path(each.where).stem.lower().startswith(_CARDS) for each in texts):
        return [("", each) for each in texts]
    rows, left = find(path).read(), _MOST_BYTES
    found, bad = [], []
    for file, line, record, messages in rows:
        where = f"{file}, row {line}"
        try:
            if isinstance(record, str):
                raise InputError(record)
            split, text = _row(where, record, config.columns)
            found.append((split, text._replace(messages=messages)))
            left -= len(text.text) + len(text.prompt or "")
            if left < 0:
                raise DataError(f"{path} has more than {_MOST_BYTES:,} letters of text; split it")
        except InputError as error:
            bad.append(f"{where}: {shorten(str(error), 300)}")
    if bad and not found:
        raise DataError(f"{bad[0]}; none of {len(bad):,} rows can be used")
    if len(bad) > config.max_damaged_records:
        more = f" (and {len(bad) - 1} more such)" if len(bad) > 1 else ""
        raise DataError(
            f"{bad[0]}{more}; repair it, or let data.max_damaged_records={len(bad)} be skipped"
        )
    return found


def _read_files(folder: Path) -> Iterator[Text]:
    """A document of each text file below a folder, in the order of their names."""
    left = _MOST_BYTES
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in _FILES or not path.is_file():
            continue
        text = _read_file(path, left)
        left -= path.stat().st_size
        if text.strip():
            yield Text(text, where=str(path))


def _read_file(path: Path, most_bytes: int) -> str:
    try:
        return read_limited(path, most_bytes)
    except InputError as error:
        raise DataError(f"{error}; save it as UTF-8, or remove it") from None


def _row(where: str, record: Record, columns: TextColumns) -> tuple[str, Text]:
    """The split that a row names, "" = none, and its text."""
    split = _text(record, columns.split).strip().lower()
    if split and split not in SPLIT_NAMES:
        raise InputError(f"{columns.split}: {split!r} is none of {', '.join(SPLITS)}")
    is_answer = columns.answer in record
    text, prompt = _text(record, columns.answer if is_answer else columns.text), None
    if is_answer:
        text, prompt = text.strip(), _text(record, columns.prompt)
    if not text.strip():
        named = f"{columns.answer!r} or {columns.text!r}"
        known = shorten(", ".join(map(repr, record)), 100)
        raise InputError(f"no text in a column {named}; it has {known}")
    return SPLIT_NAMES.get(split, ""), Text(text, prompt, where)


def _text(record: Record, name: str) -> str:
    value = record.get(name)
    if value is None or value != value:  # NaN: how data frames write a missing value
        return ""
    if isinstance(value, (bool, int, float)):
        value = json.dumps(value)
    if not isinstance(value, str):
        raise InputError(f"{name}: a {type(value).__name__}; expected a text")
    check_unicode(value, name)
    return value


def _split(
    found: Sequence[tuple[str, Text]], held_out: float
) -> tuple[dict[str, list[Text]], list[str]]:
    """Texts by split.

    Equal documents, rows of one prompt, and the answers of one conversation are in one split,
    unless others are given.
    """
    splits: dict[str, list[Text]] = {name: [] for name in SPLITS}
    if not held_out:
        splits["train"] = [each for _, each in found]
        held = {name: [each for given, each in found if given == name] for name in SPLITS[1:]}
        if any(held.values()):
            splits = {**held, "train": [each for given, each in found if given in ("", "train")]}
        empty = [name for name in SPLITS if not splits[name]]
        note = ["nothing is held out (data.held_out=0): scores are about the training texts"]
        shown = {name: splits[name] or splits["train"] for name in SPLITS}
        return shown, note if len(empty) == 2 else []
    first_prompts: dict[str, str] = {}  # by line of a table, which may hold a conversation
    key_of = [
        identity(
            each.text if each.prompt is None else first_prompts.setdefault(each.where, each.prompt)
        )
        for _, each in found
    ]
    given_to: dict[bytes, set[str]] = {}
    for key, (given, _) in zip(key_of, found, strict=True):
        if given:
            given_to.setdefault(key, set()).add(given)
    named = {key: next(s for s in SPLITS if s in given) for key, given in given_to.items()}
    ends = {"train": 1 - 2 * held_out, "validation": 1 - held_out, "test": 1.0}
    free = [key for key in key_of if key not in named]
    chosen = choose(free, ends, set().union(*given_to.values()))
    for key, (given, each) in zip(key_of, found, strict=True):
        splits[given or named.get(key) or chosen[key]].append(each)
    if empty := [name for name in SPLITS if not splits[name]]:
        raise DataError(
            f"{len(found):,} texts, and none is for {empty[0]}; give at least three different "
            "ones, or data.held_out=0 to train on all"
        )
    shared = sum(len(given) > 1 for given in given_to.values())
    note = (
        f"prompts or texts that are in more than one split: {shared:,}; scores on them are too good"
    )
    return splits, [note] if shared else []
