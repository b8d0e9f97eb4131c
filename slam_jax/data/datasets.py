"""The data sets a config can name, built on first use."""

import contextlib
import dataclasses
import io
import sys

import tensorflow_datasets as tfds

from slam_jax.data.config import DataConfig
from slam_jax.data.pipeline import Source
from slam_jax.data.scenes import Scenes
from slam_jax.data.sort_of_clevr import SortOfClevr
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three splits and the tokenizer of their text."""

    train: Source
    validation: Source
    test: Source
    tokenizer: Tokenizer


def prepare(config: DataConfig, tokenizer: Tokenizer | None = None) -> Dataset:
    """The data set `config.name`, built in `config.directory` if it is not there yet.

    Args:
      config: `sort_of_clevr` is the one data set; `sort_of_clevr/tiny` a small one for trying out.
      tokenizer: that of a checkpoint; None trains one on the training split.

    Raises:
      ConfigError: if there is no data set of that name.
    """
    name, _, variant = config.name.partition("/")
    variants = [known.name for known in SortOfClevr.BUILDER_CONFIGS]
    if name != SortOfClevr.name or (variant or "full") not in variants:
        known = ", ".join(f"sort_of_clevr/{v}" for v in variants)
        raise ConfigError(f"data.name is {config.name!r}; use sort_of_clevr or one of {known}")
    variant = variant or "full"
    _build_once(config, variant)
    train, validation, test = map(
        Scenes,
        tfds.data_source(
            f"{SortOfClevr.name}/{variant}",
            split=["train", "validation", "test"],
            data_dir=config.directory,
            decoders={"image": tfds.decode.SkipDecoding()},
            download=False,
        ),
    )
    if tokenizer is None:
        tokenizer = Tokenizer.train(train.corpus(), config.vocab_size)
    return Dataset(train, validation, test, tokenizer)


def _build_once(config: DataConfig, variant: str) -> None:
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
    except OSError:
        # Another process was faster: each builds in a folder of its own and renames it.
        if not builder.data_path.exists():
            raise
