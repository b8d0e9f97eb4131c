"""A trace of some training steps, for xprof."""

import contextlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

from slam_jax.errors import require, writing
from slam_jax.training.progress import Progress


class Profile(NamedTuple):
    """The steps to trace: `count` of them from step `first` on, which are counted from 1."""

    first: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Profile":
        """From "STEP:COUNT". Raises ConfigError for anything else."""
        found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text, re.ASCII)
        numbers = [int(number) for number in found.groups()] if found else [0]
        expected = "STEP:COUNT, two whole numbers of at least 1"
        require(min(numbers) >= 1, "--profile", text, expected)
        return cls(*numbers)

    @property
    def last(self) -> int:
        return self.first + self.count - 1

    def check(self, num_steps: int) -> None:
        """Raises ConfigError where the run ends before these steps do."""
        text, expected = f"{self.first}:{self.count}", f"steps up to {num_steps:,}, the last one"
        require(self.last <= num_steps, "--profile", text, expected)


class Profiler(contextlib.AbstractContextManager["Profiler"]):
    """Writes the trace of a run's steps to `WORKDIR/profile`.

    profile: None = no trace. first_step: from which the run resumes; it traces those of the steps
    that it takes itself.
    """

    def __init__(
        self, profile: Profile | None, first_step: int, workdir: str | Path, progress: Progress
    ):
        if profile is not None and profile.last <= first_step:
            progress.log(f"the steps of --profile are taken: up to step {first_step:,}; no trace")
        self._profile, self._progress = profile, progress
        self._folder, self._first = Path(workdir) / "profile", 0  # 0: it does not run

    def __exit__(self, *exception: object) -> None:
        if self._first:  # the run ends early
            self._stop()

    def before(self, step: int, state: Any) -> None:
        """Starts the trace if `step` is the first of it; `state`: that the step takes."""
        wanted = self._profile
        if wanted and not self._first and wanted.first <= step <= wanted.last:
            jax.block_until_ready(state)  # a trace holds whole steps
            with self._progress.paused(), writing(self._folder):
                jax.profiler.start_trace(self._folder)
            self._first = step

    def after(self, step: int, state: Any) -> None:
        """Ends the trace if `step` is the last of it; `state`: that the step returned."""
        if self._first and self._profile and step == self._profile.last:
            jax.block_until_ready(state)
            self._stop()
            steps = f"steps {self._first:,} to {step:,}"
            self._progress.log(f"profile of {steps}: xprof --logdir={self._folder}")

    def _stop(self) -> None:
        self._first = 0
        with self._progress.paused(), writing(self._folder):
            jax.profiler.stop_trace()
