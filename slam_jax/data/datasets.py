"""The data sets a config can name, built on first use."""

import contextlib
import dataclasses
import io
import sys
from collections.abc import Iterator

import tensorflow_datasets as tfds

from slam_jax.data.config import DataConfig
from slam_jax.data.pipeline import Source
from slam_jax.data.records import DataError, Records
from slam_jax.data.scenes import Scenes
from slam_jax.data.sort_of_clevr import SortOfClevr
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.errors import ConfigError, first_line


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three splits and the tokenizer of their text.

    corpus_is_whole: no record that a tokenizer is trained on is damaged, so that the same data give
    the same tokenizer.
    """

    train: Source
    validation: Source
    test: Source
    tokenizer: Tokenizer
    corpus_is_whole: bool = True


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None) -> Dataset:
    """The data set `config.name`, built in `config.directory` if it is not there yet.

    Args:
      config: `sort_of_clevr` is the one data set; `sort_of_clevr/tiny` a small one for trying out.
      tokenizer: that of a checkpoint; None trains one on the training split.

    Raises:
      ConfigError: if there is no data set of that name.
      DataError: if it can neither be read nor built.
    """
    name, _, variant = config.name.partition("/")
    variants = [known.name for known in SortOfClevr.BUILDER_CONFIGS]
    if name != SortOfClevr.name or (variant or "full") not in variants:
        known = ", ".join(f"sort_of_clevr/{v}" for v in variants)
        raise ConfigError(f"data.name is {config.name!r}; use sort_of_clevr or one of {known}")
    variant = variant or "full"
    _build_once(config, variant)
    splits = _read(config, variant)
    train, validation, test = map(Scenes, splits)
    if tokenizer is None:
        tokenizer = Tokenizer.train(train.corpus(), config.vocab_size)
    return Dataset(train, validation, test, tokenizer, corpus_is_whole=not splits[0].damaged)


def _read(config: DataConfig, variant: str) -> list[Records]:
    splits = ("train", "validation", "test")
    name = f"{SortOfClevr.name}/{variant}"
    with _reading(config):
        sources = tfds.data_source(
            name,
            split=list(splits),
            data_dir=config.directory,
            decoders={"image": tfds.decode.SkipDecoding()},
            download=False,
        )
    return [
        Records(records, f"{name}, {split}", config.max_damaged_records)
        for split, records in zip(splits, sources, strict=True)
    ]


@contextlib.contextmanager
def _reading(config: DataConfig) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # TFDS, protobuf and array_record have no one type for it
        raise DataError(
            f"{config.directory}: {config.name} cannot be read ({first_line(error)}); delete "
            f"{config.directory / SortOfClevr.name}, and it is built again"
        ) from error


def _build_once(config: DataConfig, variant: str) -> None:
    with _reading(config):
        builder = SortOfClevr(data_dir=config.directory, config=variant, file_format="array_record")
    if builder.data_path.exists():
        return
    scenes = sum(builder.scenes.values())
    print(f"building {config.name} ({scenes:,} scenes) in {config.directory}", file=sys.stderr)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
    except Exception as error:  # array_record, TFDS and the system each have types of their own
        # Or another process was faster: each builds in a folder of its own and renames it.
        if not builder.data_path.exists():
            raise DataError(
                f"{config.directory}: {config.name} could not be built ({first_line(error)}); "
                "check free space and permissions, or set data.data_dir"
            ) from error
