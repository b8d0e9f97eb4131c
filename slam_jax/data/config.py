"""What to train on, in which order."""

import bisect
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slam_jax.data.tokenizer import SMALLEST_VOCABULARY
from slam_jax.data.views import TRAINING_VIEWS
from slam_jax.errors import ConfigError, require, require_count


class Stage(NamedTuple):
    """From step `first` on the views come at these rates."""

    first: int
    rates: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    name: a data set of `slam_jax.data.prepare`, with its variant after a slash where it has some.
    data_dir: where built data sets are kept; None = $SLAM_JAX_DATA_DIR or ~/.cache/slam_jax/tfds.
    path: of the data set "folder": the folder with its table, or the table itself.
    batch_size: examples per step over all processes.
    seed: of shuffling, rendering and the choice of views.
    augment: training pictures of folders and the like lose up to this share of each side, another
      part each time; 0 = they are shown as they are.
    drop_inputs: in training, each input of a folder's row is left out at this rate, though never
      all of them; the model then answers from any mix, and is evaluated on each.
    max_damaged_records: how many records of a split may be damaged; they are passed over, and one
      more ends the run.
    vocab_size: most tokens the tokenizer may learn.
    table_version: how the table of a folder is read. 2 = equal pictures are in one split whatever
      their names, answers and kinds are stripped and in Unicode NFC, true and false are read alike
      from every format, and outliers do not count for the scale of numbers. None = as version
      0.11.0 did, whose checkpoints go on with it. `default_config` gives 2.
    stages: (first step, {view: rate}); from that step on a batch is of that view with probability
      proportional to the rate. Lists, as JSON gives them, are accepted.

    Raises:
      ConfigError: naming the field, if a value cannot be used.
    """

    name: str = "sort_of_clevr"
    data_dir: str | None = None
    path: str | None = None
    batch_size: int = 64
    seed: int = 0
    augment: float = 0.0
    drop_inputs: float = 0.0
    max_damaged_records: int = 10
    vocab_size: int = 512
    table_version: int | None = None
    stages: Sequence[Any] = ((0, {"image": 1.0}),)

    def __post_init__(self) -> None:
        require_count("batch_size", self.batch_size)
        require_count("vocab_size", self.vocab_size, least=SMALLEST_VOCABULARY)
        require_count("max_damaged_records", self.max_damaged_records, least=0)
        versions = (None, 2)
        require(self.table_version in versions, "table_version", self.table_version, "None or 2")
        require(0 <= self.augment < 1, "augment", self.augment, "a share from 0 to below 1")
        require(0 <= self.drop_inputs < 1, "drop_inputs", self.drop_inputs, "a rate in [0, 1)")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; it must be in 0..{2**32 - 1}")
        stages = tuple(_stage(i, stage) for i, stage in enumerate(self.stages))
        starts = [stage.first for stage in stages]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise ConfigError(f"stages begin at steps {starts}; they must begin at 0 and increase")
        object.__setattr__(self, "stages", stages)

    @property
    def directory(self) -> pathlib.Path:
        chosen = self.data_dir or os.environ.get("SLAM_JAX_DATA_DIR") or "~/.cache/slam_jax/tfds"
        try:
            return pathlib.Path(chosen).expanduser()
        except RuntimeError:
            raise ConfigError(
                f"data_dir is {chosen!r} and there is no home folder; give data.data_dir or "
                "$SLAM_JAX_DATA_DIR another place"
            ) from None

    @property
    def views(self) -> tuple[str, ...]:
        """Every view that some stage uses, in the order of `TRAINING_VIEWS`."""
        rates = [item for stage in self.stages for item in stage.rates.items()]
        used = {view for view, rate in rates if rate > 0}
        return tuple(view for view in TRAINING_VIEWS if view in used)

    def stage(self, step: int) -> Stage:
        """The stage that step `step` falls into."""
        return self.stages[bisect.bisect([stage.first for stage in self.stages], step) - 1]

    def view(self, step: int) -> str:
        """The view of step `step`, drawn at the rates of its stage from (seed, step) alone."""
        rates = self.stage(step).rates
        # Sorted: JSON and ConfigDict do not keep the order in which rates were written.
        names = sorted(rates)
        weights = np.array([rates[name] for name in names])
        rng = np.random.default_rng((self.seed, step))
        return names[rng.choice(len(names), p=weights / weights.sum())]


def _stage(i: int, stage: Any) -> Stage:
    try:
        first, rates = stage
        first, rates = int(first), {str(view): float(rate) for view, rate in rates.items()}
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise ConfigError(
            f"stages[{i}] is {stage!r}; it must be (first step, {{view: rate}}), "
            'such as (0, {"image": 1.0})'
        ) from None
    for view, rate in rates.items():
        if view not in TRAINING_VIEWS:
            raise ConfigError(
                f"stages[{i}] names the view {view!r}; use one of {', '.join(TRAINING_VIEWS)}"
            )
        if not 0 <= rate <= 1e9:
            raise ConfigError(f"stages[{i}] gives {view} the rate {rate}; it must be in 0..1e9")
    if not any(rates.values()):
        raise ConfigError(f"stages[{i}] has no view with a rate above 0; give at least one")
    return Stage(first, rates)
