"""Real text: documents are read, split and tokenized once for all systems."""

import hashlib
import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from slam_jax.data.public import read_texts
from slam_jax.data.records import DataError
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.errors import InputError, write_whole, writing

STDLIB, TFDS = "stdlib", "tfds:"
# Folders of the standard library that are not used: installed packages, tests, and tables of
# character sets. Tables are near copies of each other, so that one of them in the test split would
# not be new.
_SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
_SPLITS = {"test": 0.1, "validation": 0.15, "train": 1.0}  # ends of their shares
_FEWEST = 3
_ARRAYS = ("train", "validation_tokens", "validation_ends", "test_tokens", "test_ends")


class Corpus(NamedTuple):
    """Tokenized documents, one after the other, each with <bos> first and <eos> last.

    arrays: "train", the tokens; of the splits "validation" and "test", "<split>_tokens" and
    "<split>_ends", where each document ends. about: the source, its size and a hash of all of it.
    """

    arrays: dict[str, Any]
    tokenizer: Tokenizer
    about: dict[str, Any]

    def documents(self, split: str, most: int) -> Iterator[Int[np.ndarray, "_"]]:
        """<bos> and the first `most` tokens of each document of "validation" or "test"."""
        tokens, ends = self.arrays[f"{split}_tokens"], self.arrays[f"{split}_ends"]
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            yield tokens[start : min(end, start + most + 1)]


def read_documents(text: str) -> list[str]:
    """The documents of "stdlib", of a TFDS text set "tfds:name", or of the files of a folder.

    "stdlib" is the source text of the running interpreter's standard library. In a folder every
    file of UTF-8 text is a document, whatever its name; hidden files are left out.

    Raises:
      DataError: there are none, or they cannot be read.
    """
    if text.startswith(TFDS):
        return read_texts(text.removeprefix(TFDS))
    stdlib = text == STDLIB
    root, texts = Path(sysconfig.get_paths()["stdlib"] if stdlib else text), []
    if not root.is_dir():
        raise DataError(f"text is {text!r}; give {STDLIB!r}, {TFDS}NAME or a folder of files")
    for path in sorted(root.rglob("*.py" if stdlib else "*")):
        parts = path.relative_to(root).parts
        if any(part in _SKIPPED if stdlib else part.startswith(".") for part in parts):
            continue
        try:
            if path.is_file():
                texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise DataError(f"{path} could not be read ({error.strerror})") from error
    return texts


def split_documents(documents: Iterable[str]) -> dict[str, list[str]]:
    """Documents by split: 10% test, 5% validation, the rest for training.

    The hash of a document decides its split and its place there, so that neither depends on other
    documents or on names. Copies are used once.

    Raises DataError if a split has fewer than three.
    """
    by_hash = {_hash(text): text for text in documents if text.strip()}
    splits: dict[str, list[str]] = {name: [] for name in _SPLITS}
    # The first eight digits choose the split, the others the order.
    for digest in sorted(by_hash, key=lambda digest: digest[8:]):
        share = int(digest[:8], 16) / 16**8
        split = next(name for name, end in _SPLITS.items() if share < end)
        splits[split].append(by_hash[digest])
    for name, texts in splits.items():
        if len(texts) < _FEWEST:
            raise DataError(
                f"{len(by_hash)} documents, of which {len(texts)} are for {name}; at least "
                f"{_FEWEST} are needed there: give more documents, about 100 or more"
            )
    return splits


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def make_corpus(text: str, vocab_size: int) -> Corpus:
    """Reads, splits and tokenizes. The tokenizer is learned from the training split.

    Raises DataError as `read_documents` and `split_documents` do.
    """
    splits = split_documents(read_documents(text))
    tokenizer = Tokenizer.train(splits["train"], vocab_size)
    about: dict[str, Any] = {"text": text, "vocab_size": tokenizer.vocab_size}
    about["asked"] = {"text": text, "vocab_size": vocab_size}
    if text == STDLIB:
        name = platform.python_implementation()
        about["version"] = f"{name} {platform.python_version()} ({sys.platform})"
    arrays = {}
    for name, texts in splits.items():
        tokens = [
            np.array([tokenizer.bos_id, *tokenizer.encode(each), tokenizer.eos_id], np.int32)
            for each in texts
        ]
        arrays[f"{name}_tokens"] = np.concatenate(tokens)
        arrays[f"{name}_ends"] = np.cumsum([len(each) for each in tokens])
        about[name] = {
            "documents": len(texts),
            "bytes": sum(len(each.encode()) for each in texts),
            "tokens": len(arrays[f"{name}_tokens"]),
        }
    about["sha256"] = _hash("".join(_hash(each) for texts in splits.values() for each in texts))
    arrays["train"] = arrays["train_tokens"]
    return Corpus({name: arrays[name] for name in _ARRAYS}, tokenizer, about)


def save_corpus(corpus: Corpus, folder: Path) -> None:
    """For `load_corpus`; arrays and JSON. Raises WriteError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"tokens.{os.getpid()}.npz"
        np.savez(temporary, **corpus.arrays)
        os.replace(temporary, folder / "tokens.npz")
    write_whole(folder / "tokenizer.json", corpus.tokenizer.to_json())
    write_whole(folder / "about.json", json.dumps(corpus.about, indent=1))


def load_corpus(folder: Path) -> Corpus:
    """Raises InputError if `save_corpus` did not write it."""
    try:
        with np.load(folder / "tokens.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
        about = json.loads((folder / "about.json").read_text())
        return Corpus(arrays, Tokenizer.load(folder / "tokenizer.json"), about)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: not a corpus ({error}); delete it and start again") from None


def training_rows(
    tokens: Int[np.ndarray, "N"], length: int, seed: int, step: int, batch_size: int
) -> Int[np.ndarray, "B T_1"]:
    """The batch of a step: rows of `length` + 1 tokens, of which all but the first are predicted.

    Every row is used once an epoch. The same seed gives the same rows in the same order to every
    system. Raises InputError for a text that is shorter than a row.
    """
    count = (len(tokens) - 1) // length
    if count < 1:
        raise InputError(f"{len(tokens)} tokens to train on; rows of {length} need more")
    places = [divmod(i, count) for i in range(step * batch_size, (step + 1) * batch_size)]
    epochs = {epoch for epoch, _ in places}
    orders = {epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in epochs}
    starts = [length * int(orders[epoch][place]) for epoch, place in places]
    return np.stack([tokens[start : start + length + 1] for start in starts])
