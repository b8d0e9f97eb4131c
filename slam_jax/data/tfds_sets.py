"""Any data set of TFDS, by a mapping of its features."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slam_jax.data.built import build_public, open_splits, read_info
from slam_jax.data.config import DataConfig
from slam_jax.data.formats.base import HUB_NAMES
from slam_jax.data.records import DataError, Mapped
from slam_jax.data.rows import ANY_KIND, Row
from slam_jax.data.splits import SPLIT_NAMES, SPLITS
from slam_jax.errors import ConfigError, InputError, check_names, require


class TfdsRows(NamedTuple):
    """Rows by split, which are read when they are indexed. streams: what a row shows; lacking:
    those of them that a row may lack. read: ours -> the name of the feature."""

    rows: Mapping[str, Mapped]
    streams: tuple[str, ...]
    lacking: tuple[str, ...]
    read: Mapping[str, str]


def read_tfds(config: DataConfig) -> TfdsRows:
    """The rows of `tfds/NAME`, or `tfds/NAME/CONFIG`, with the features of `config.columns`.

    A feature in a group is named with a slash, such as "captions/text", and a sequence of texts
    gives several answers. Without a mapping the usual names count, such as image, question, answer
    and label. A missing validation or test split is the last tenth of the training records.

    Raises:
      ConfigError: there is no such feature, or none for the answers.
      DataError: the data set can neither be read nor built.
    """
    name = config.name.removeprefix("tfds").strip("/")
    require(bool(name), "data.name", config.name, "the name of a set, such as tfds/vqa")
    require(not config.columns.numbers, "data.columns.numbers", config.columns.numbers, "None")
    config = dataclasses.replace(config, name=name)
    build_public(config, name)
    info = read_info(config, name)
    features = _flatten(info.features)
    read = _choose(features, config, name)
    splits = _slices(name, list(info.splits))
    opened = open_splits(config, f"{name}:*.*.*", splits, images=_pictures(info.features))
    row_of = _RowOf(name, read, {key: _class_names(each) for key, each in features.items()})
    rows = {split: Mapped(each, row_of) for split, each in zip(SPLITS, opened, strict=True)}
    streams = tuple(stream for stream in ("text", "image") if stream in read)
    require(
        bool(streams), "data.columns", dict(read), f"an image or a text of {', '.join(features)}"
    )
    return TfdsRows(rows, streams, streams, read)


def _choose(features: Mapping[str, Any], config: DataConfig, name: str) -> dict[str, str]:
    read = {ours: feature for ours, feature in config.columns.named.items() if feature is not None}
    for ours, feature in read.items():
        check_names([feature], list(features), f"data.columns.{ours}: {name}", "feature")
    for ours, names in HUB_NAMES.items():
        usable = [n for n in names if n in features and n not in read.values()]
        if ours not in read and ours != "split" and usable:
            read[ours] = usable[0]
    if "answer" not in read:
        raise ConfigError(
            f"{name} has the features {', '.join(features)}; name that of the answers with "
            "data.columns.answer"
        )
    return read


class _RowOf:
    """A row of a record. It can be pickled, for worker processes."""

    def __init__(self, name: str, read: Mapping[str, str], classes: Mapping[str, Any]):
        self._name, self._read, self._classes = name, read, classes

    def __call__(self, record: Mapping[str, Any]) -> Row:
        values = _flatten(record)

        def texts(ours: str) -> list[str]:
            name = self._read.get(ours)
            return [] if name is None else _texts(values[name], self._classes.get(name))

        answers = tuple(text for each in texts("answer") if (text := each.strip()))
        if not answers:
            raise InputError(f"{self._name}: a record without an answer")
        image = self._read.get("image")
        return Row(
            image=None if image is None else values[image],
            text=" ".join(texts("text")) or None,
            numbers=None,
            prompt=" ".join(texts("prompt")),
            answers=answers,
            kind=" ".join(texts("kind")) or ANY_KIND,
        )


def _texts(value: Any, classes: Sequence[str] | None) -> list[str]:
    values = np.asarray(value, object).reshape(-1).tolist()
    if classes is not None:
        return [str(classes[each]) for each in values if 0 <= each < len(classes)]
    return [
        each.decode(errors="replace") if isinstance(each, bytes) else str(each) for each in values
    ]


def _flatten(group: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested groups, named with slashes."""
    if not hasattr(group, "items"):
        inner = getattr(group, "feature", None)  # of a sequence
        if inner is not None and hasattr(inner, "items"):
            return _flatten(inner, prefix)
        return {prefix: group}
    found: dict[str, Any] = {}
    for name, value in group.items():
        found |= _flatten(value, f"{prefix}/{name}" if prefix else str(name))
    return found


def _pictures(features: Any) -> tuple[str, ...]:
    """The features that are pictures, outside of groups: their bytes are not decoded by TFDS."""
    import tensorflow_datasets as tfds

    return tuple(n for n, each in features.items() if isinstance(each, tfds.features.Image))


def _class_names(feature: Any) -> list[str] | None:
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return list(names) if isinstance(names, list) else None


def _slices(name: str, known: Sequence[str]) -> tuple[str, str, str]:
    """The splits of TFDS for training, validation and test."""
    found: dict[str, str] = {}
    for split in known:
        found.setdefault(SPLIT_NAMES.get(split.lower(), ""), split)
    if "train" not in found:
        raise DataError(f"{name} has the splits {', '.join(known)}; expected one named train")
    train, lacking = found["train"], [split for split in SPLITS[1:] if split not in found]
    ends = {
        split: f"{train}[{-10 * i}%:{-10 * i + 10 or ''}{'%' if i > 1 else ''}]"
        for i, split in enumerate(reversed(lacking), 1)
    }
    if lacking:
        found["train"] = f"{train}[:-{10 * len(lacking)}%]"
    found |= ends
    return found["train"], found["validation"], found["test"]
