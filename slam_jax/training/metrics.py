"""Metrics of a run: one JSON line per record in `WORKDIR/metrics.jsonl`, and trackers."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slam_jax.errors import first_line, write_whole, writing
from slam_jax.training.tracking import Tracker, open_trackers, require_packages

_FILE = "metrics.jsonl"


class MetricsWriter(contextlib.AbstractContextManager["MetricsWriter"]):
    """Appends records to the metrics file of a run, and flushes each of them.

    workdir: folder of the run, created if needed.
    resume_step: step from which the run resumes. Records of later steps are removed, as they will
    be written again, and so is an unfinished last line of a killed run.
    evaluated: False removes the evaluation of that step, too, as it is still to be done.
    trackers: names of `slam_jax.training.tracking.TRACKERS`, which get all numbers as well. config:
    of the run, for them.

    Raises ConfigError where a tracker cannot start; and WriteError, here and in `write`, where the
    file cannot be written. A tracker that fails later is logged and ends; the run continues.
    """

    def __init__(
        self,
        workdir: str | Path,
        resume_step: int = 0,
        *,
        evaluated: bool = True,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] = {},
    ):
        workdir = Path(workdir)
        self._path = workdir / _FILE
        require_packages(trackers)
        with writing(self._path):
            workdir.mkdir(parents=True, exist_ok=True)
            _drop_after(self._path, (resume_step, evaluated))
            self._file = self._path.open("a", encoding="utf-8")
        try:
            self._trackers = open_trackers(trackers, workdir, config, resume_step)
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Writes one record.

        split: `train`, `validation`, `speed` or `change`. values: numbers or arrays of one element;
        NaN and infinities become null, as JSON has neither. Texts are written to the file only.
        """
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        numbers = {name: float(value) for name, value in values.items() if name not in texts}
        finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        line = json.dumps({"step": int(step), "split": split, **texts, **finite}) + "\n"
        with writing(self._path):
            self._file.write(line)
            self._file.flush()
        named = {f"{split}/{name}": number for name, number in finite.items() if number is not None}
        self._each_tracker(lambda tracker: tracker.log(int(step), named))

    def write_change(self, step: int, text: str) -> None:
        """Writes that the run was changed after this step, unless that was written before."""
        known = [(step, "change", text)] if text else []
        records = ((r["step"], r["split"], r.get("text")) for r in read_metrics(self._path.parent))
        if known and known[0] not in records:
            self.write(step, "change", {"text": text})

    def sync(self) -> None:
        """Flushes the file to disk, so that a power cut loses nothing."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with writing(self._path):
            self._file.close()
        self._each_tracker(lambda tracker: tracker.close())

    def _each_tracker(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # each has its own error types
                self._trackers.remove(tracker)
                name, reason = type(tracker).__name__, first_line(error)
                logging.getLogger("slam_jax").warning("%s failed and ends: %s", name, reason)


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
