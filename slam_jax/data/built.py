"""Data sets that TFDS builds once. They are read by index and without TensorFlow."""

import contextlib
import functools
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from slam_jax.data.config import DataConfig
from slam_jax.data.records import DataError
from slam_jax.errors import first_line


def build_once(
    config: DataConfig,
    make_builder: Callable[..., Any],
    num_examples: int | None = None,
    advice: str = "check free space and permissions, or set data.data_dir",
) -> None:
    """Builds the data set in `config.directory` unless it is there, and prints that it does.

    `make_builder` takes `data_dir` and `file_format`. Raises DataError, which ends with `advice`,
    if the data set cannot be built.
    """
    with _reading(config):
        builder = make_builder(data_dir=config.directory, file_format="array_record")
    if builder.data_path.exists():
        return
    size = "" if num_examples is None else f" ({num_examples:,} examples)"
    print(f"building {config.name}{size} in {config.directory}", file=sys.stderr)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
    except Exception as error:  # array_record, TFDS and the system have their own error types
        # Another process may have been faster: each builds in its own folder and renames it.
        if not builder.data_path.exists():
            raise DataError(
                f"{config.directory}: {config.name} could not be built ({first_line(error)}); "
                + advice
            ) from error


def open_splits(
    config: DataConfig, name: str, splits: Sequence[str], *, images: Sequence[str] = ("image",)
) -> list[Sequence[Any]]:
    """Returns random access to the records of each split, the features `images` as undecoded bytes.

    Raises DataError if the data set cannot be read.
    """
    with _reading(config):
        sources: Any = tfds.data_source(
            name,
            split=list(splits),
            data_dir=config.directory,
            decoders={name: tfds.decode.SkipDecoding() for name in images} or None,
            download=False,
        )
    return sources


def open_public(
    config: DataConfig, name: str, splits: Sequence[str], *, images: Sequence[str] = ("image",)
) -> list[Sequence[Any]]:
    """As `open_splits`, of a data set of TFDS, which downloads and builds it with TensorFlow.

    Raises DataError if the data set can neither be read nor built.
    """
    build_public(config, name)
    # Given a version, TFDS only reads the files; its code for COCO would import TensorFlow.
    return open_splits(config, f"{name}:*.*.*", splits, images=images)


def read_info(config: DataConfig, name: str) -> Any:
    """The description of a data set of TFDS that is there: its features and splits."""
    with _reading(config):
        return tfds.builder(f"{name}:*.*.*", data_dir=config.directory).info


def build_public(config: DataConfig, name: str) -> None:
    """Has TFDS download and build the data set with TensorFlow, unless it is there.

    Raises DataError if it cannot be built, or is there in files that cannot be read by index.
    """
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


@contextlib.contextmanager
def _reading(config: DataConfig) -> Iterator[None]:
    """Raises DataError for any error in its body."""
    try:
        yield
    except Exception as error:  # TFDS, protobuf and array_record have no common error type
        folder = config.directory / config.name.partition("/")[0]
        raise DataError(
            f"{config.directory}: {config.name} cannot be read ({first_line(error)}); delete "
            f"{folder}, and it is built again"
        ) from error
