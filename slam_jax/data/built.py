"""Data sets that TFDS builds once and reads by index, without TensorFlow."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from slam_jax.data.config import DataConfig
from slam_jax.data.records import DataError
from slam_jax.errors import first_line


def build_once(
    config: DataConfig, make_builder: Callable[..., Any], num_examples: int | None = None
) -> None:
    """Builds the data set in `config.directory` if it is not there yet, and says so.

    make_builder: takes `data_dir` and `file_format`. Raises DataError where it cannot be built.
    """
    with reading(config):
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
    except Exception as error:  # array_record, TFDS and the system each have types of their own
        # Or another process was faster: each builds in a folder of its own and renames it.
        if not builder.data_path.exists():
            raise DataError(
                f"{config.directory}: {config.name} could not be built ({first_line(error)}); "
                "check free space and permissions, or set data.data_dir"
            ) from error


def open_splits(
    config: DataConfig, name: str, splits: Sequence[str], *, pictures: bool = True
) -> list[Sequence[Any]]:
    """Random access to the records of each split; their `pictures` as the bytes of their files.

    Raises DataError where the data set cannot be read.
    """
    with reading(config):
        sources: Any = tfds.data_source(
            name,
            split=list(splits),
            data_dir=config.directory,
            decoders={"image": tfds.decode.SkipDecoding()} if pictures else None,
            download=False,
        )
    return sources


@contextlib.contextmanager
def reading(config: DataConfig) -> Iterator[None]:
    """Raises DataError for whatever fails in its body."""
    try:
        yield
    except Exception as error:  # TFDS, protobuf and array_record have no one type for it
        folder = config.directory / config.name.partition("/")[0]
        raise DataError(
            f"{config.directory}: {config.name} cannot be read ({first_line(error)}); delete "
            f"{folder}, and it is built again"
        ) from error
