"""Metrics of a run: one JSON line per record in `WORKDIR/metrics.jsonl`, and TensorBoard files."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slam_jax.errors import ConfigError, write_whole, writing

_FILE = "metrics.jsonl"


class MetricsWriter(contextlib.AbstractContextManager["MetricsWriter"]):
    """Appends records to the metrics file of a run, and flushes each of them.

    workdir: folder of the run, created if needed.
    resume_step: step from which the run resumes. Records of later steps are removed, as they will
    be written again, and so is an unfinished last line of a killed run.
    evaluated: False removes the evaluation of that step, too, as it is still to be done.
    tensorboard: also write event files to `WORKDIR/tensorboard`.

    Raises ConfigError where `tensorboard` is set and tensorboardX is not installed; and WriteError,
    here and in `write`, where the file cannot be written.
    """

    def __init__(
        self,
        workdir: str | Path,
        resume_step: int = 0,
        *,
        evaluated: bool = True,
        tensorboard: bool = False,
    ):
        workdir = Path(workdir)
        self._path = workdir / _FILE
        self._board = _board(workdir / "tensorboard", resume_step) if tensorboard else None
        with writing(self._path):
            workdir.mkdir(parents=True, exist_ok=True)
            _drop_after(self._path, (resume_step, evaluated))
            self._file = self._path.open("a", encoding="utf-8")

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Writes one record.

        split: `train`, `validation` or `speed`. values: numbers or arrays of one element; NaN and
        infinities become null, as JSON has neither. Texts are written to the file only.
        """
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        numbers = {name: float(value) for name, value in values.items() if name not in texts}
        finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        line = json.dumps({"step": int(step), "split": split, **texts, **finite}) + "\n"
        with writing(self._path):
            self._file.write(line)
            self._file.flush()
        if self._board is not None:
            for name, number in numbers.items():
                self._board.add_scalar(f"{split}/{name}", number, int(step))

    def sync(self) -> None:
        """Flushes the file to disk, so that a power cut loses nothing."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with writing(self._path):
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """All records of a run, in order: `step`, `split`, and floats or None by name."""
    return [record for record, _ in _records(Path(workdir) / _FILE)]


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Records and their lines; an unfinished line of a killed run is skipped."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            whole = line.endswith("\n") and isinstance(record, dict)
            if whole and isinstance(record.get("step"), int):
                yield record, line


def _drop_after(path: Path, last: tuple[int, bool]) -> None:
    """Removes the records after `last`: a step, and whether its evaluation is kept."""
    kept = "".join(
        line
        for record, line in _records(path)
        if (record["step"], record.get("split") == "validation") <= last
    )
    if path.exists() and kept.encode() != path.read_bytes():
        write_whole(path, kept)  # a kill in between loses no line


def _board(folder: Path, resume_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ConfigError(
            "TensorBoard needs tensorboardX, which is not installed: "
            "`pip install 'slam_jax[tracking]'`, or turn it off in the configuration"
        ) from None
    return SummaryWriter(str(folder), purge_step=resume_step + 1)
