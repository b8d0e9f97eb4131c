"""Real text in documents: read, split by document, made into tokens once for all systems."""

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
# Of the interpreter's library: what is installed into it, its tests, and tables of character sets,
# which are near copies of each other, so that one of them held out would not be new.
_NOT_TEXT = {"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings"}
_SPLITS = (("test", 0.1), ("validation", 0.15), ("train", 1.0))
_FEWEST = 3


class HeldOut(NamedTuple):
    """Documents in tokens, <bos> first and <eos> last, one after the other; `ends` of each."""

    tokens: Int[np.ndarray, "N"]
    ends: Int[np.ndarray, "documents"]

    def documents(self, at_most: int) -> Iterator[Int[np.ndarray, "_"]]:
        """Each document's first `at_most` tokens after its <bos>, and that."""
        for start, end in zip([0, *self.ends[:-1]], self.ends, strict=True):
            yield self.tokens[start : min(end, start + at_most + 1)]


class Corpus(NamedTuple):
    """train: documents one after the other, as in `HeldOut`. about: where it comes from, how much
    of it there is, and a hash of all."""

    train: Int[np.ndarray, "N"]
    validation: HeldOut
    test: HeldOut
    tokenizer: Tokenizer
    about: dict[str, Any]


def read_documents(text: str) -> list[str]:
    """The documents of "stdlib", of a TFDS text set "tfds:name", or of a folder's files.

    "stdlib" is the source text of the running interpreter's standard library. Of a folder every
    file is a document that is UTF-8 text, whatever its name; hidden ones are left out.

    Raises:
      DataError: there are none, or they cannot be read.
    """
    if text == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = _files(
            path for path in root.rglob("*.py") if not _NOT_TEXT & {*path.relative_to(root).parts}
        )
    elif text.startswith(TFDS):
        found = read_texts(text.removeprefix(TFDS))
    else:
        root = Path(text)
        if not root.is_dir():
            raise DataError(f"text is {text!r}; give {STDLIB!r}, {TFDS}NAME or a folder of files")
        found = _files(
            path
            for path in root.rglob("*")
            if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)
        )
    return found


def _files(paths: Iterable[Path]) -> list[str]:
    texts = []
    for path in sorted(paths):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        except OSError as error:
            raise DataError(f"{path} could not be read ({error.strerror})") from error
    return texts


def split_documents(documents: Iterable[str]) -> dict[str, list[str]]:
    """Documents by split: 10% test, 5% validation, the rest for training.

    The hash of a document decides where it goes and in which order it stands, so that neither
    depends on the others or on names, and what is there twice is used once.

    Raises DataError where a split has fewer than three.
    """
    by_hash = {_hash(text): text for text in documents if text.strip()}
    splits: dict[str, list[str]] = {name: [] for name, _ in _SPLITS}
    for digest in sorted(by_hash):
        place = int(digest[:8], 16) / 16**8
        # The last digits order; the first have chosen the split already.
        splits[next(name for name, end in _SPLITS if place < end)].append(digest)
    for name, digests in splits.items():
        if len(digests) < _FEWEST:
            raise DataError(
                f"{len(by_hash)} documents, of which {len(digests)} are for {name}; at least "
                f"{_FEWEST} are needed there: give more documents, about 100 or more"
            )
    return {
        name: [by_hash[digest] for digest in sorted(digests, key=lambda d: d[8:])]
        for name, digests in splits.items()
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def make_corpus(text: str, vocab_size: int) -> Corpus:
    """Reads, splits and tokenizes. The tokenizer is learned from the training split.

    Raises DataError as `read_documents` and `split_documents` do.
    """
    splits = split_documents(read_documents(text))
    tokenizer = Tokenizer.train(splits["train"], vocab_size)
    tokens = {name: [_tokens(tokenizer, each) for each in docs] for name, docs in splits.items()}
    held_out = {
        name: HeldOut(np.concatenate(tokens[name]), np.cumsum([len(d) for d in tokens[name]]))
        for name in ("validation", "test")
    }
    about: dict[str, Any] = {"text": text, "vocab_size": tokenizer.vocab_size}
    about["asked"] = {"text": text, "vocab_size": vocab_size}
    if text == STDLIB:
        name = platform.python_implementation()
        about["version"] = f"{name} {platform.python_version()} ({sys.platform})"
    for name, docs in splits.items():
        about[name] = {
            "documents": len(docs),
            "bytes": sum(len(each.encode()) for each in docs),
            "tokens": int(sum(len(each) for each in tokens[name])),
        }
    about["sha256"] = _hash("".join(_hash(each) for docs in splits.values() for each in docs))
    train = np.concatenate(tokens["train"])
    return Corpus(train, held_out["validation"], held_out["test"], tokenizer, about)


def _tokens(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, "T"]:
    return np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.int32)


def save_corpus(corpus: Corpus, folder: Path) -> None:
    """For `load_corpus`; arrays and JSON. Raises WriteError."""
    held_out = {
        f"{name}_{field}": array
        for name in ("validation", "test")
        for field, array in getattr(corpus, name)._asdict().items()
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"tokens.{os.getpid()}.npz"
        np.savez(temporary, train=corpus.train, **held_out)
        os.replace(temporary, folder / "tokens.npz")
    write_whole(folder / "tokenizer.json", corpus.tokenizer.to_json())
    write_whole(folder / "about.json", json.dumps(corpus.about, indent=1))


def load_corpus(folder: Path) -> Corpus:
    """Raises InputError where it is not one that `save_corpus` wrote."""
    try:
        with np.load(folder / "tokens.npz", allow_pickle=False) as arrays:
            held_out = {
                name: HeldOut(arrays[f"{name}_tokens"], arrays[f"{name}_ends"])
                for name in ("validation", "test")
            }
            train = arrays["train"]
        about = json.loads((folder / "about.json").read_text())
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: not a corpus ({error}); delete it and start again") from None
    return Corpus(train, held_out["validation"], held_out["test"], tokenizer, about)


class Rows:
    """Training rows of `length` + 1 tokens, each token but the first predicted once an epoch.

    The same seed gives the same rows in the same order to every system.
    """

    def __init__(self, tokens: Int[np.ndarray, "N"], length: int, seed: int):
        self._count = (len(tokens) - 1) // length
        if self._count < 1:
            raise InputError(f"{len(tokens)} tokens to train on; rows of {length} need more")
        self._tokens, self._length, self._seed = tokens, length, seed

    def __call__(self, step: int, batch_size: int) -> Int[np.ndarray, "B T_1"]:
        """The batch of a step: rows without return until all have been seen."""
        rows = []
        for i in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(i, self._count)
            start = int(self._order(epoch)[place]) * self._length
            rows.append(self._tokens[start : start + self._length + 1])
        return np.stack(rows)

    def _order(self, epoch: int) -> Int[np.ndarray, "rows"]:
        return np.random.default_rng((self._seed, epoch)).permutation(self._count)
