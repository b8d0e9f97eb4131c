"""The configuration of the data of a run."""

import bisect
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from slam_jax.data.images import RESIZE_POLICIES
from slam_jax.data.tokenizer import SMALLEST_VOCABULARY
from slam_jax.data.views import TRAINING_VIEWS
from slam_jax.errors import ConfigError, check_names, require, require_count

_MOST_PARTS = 256  # of a mixture


class Stage(NamedTuple):
    """The rates at which views are drawn from step `first` on."""

    first: int
    rates: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """Names of columns of a folder's data, or features of a TFDS set.

    prompt, answer, image, text, kind, split: the column that is read as it; None = the usual name
    of the format. numbers: the columns of numbers that are inputs; None = all, without identifiers
    in formats of the hub; () = none.
    """

    prompt: str | None = None
    answer: str | None = None
    image: str | None = None
    text: str | None = None
    kind: str | None = None
    split: str | None = None
    numbers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.named.values() if name is not None]
        if self.numbers is not None:
            is_list = isinstance(self.numbers, (list, tuple))
            require(is_list, "columns.numbers", self.numbers, "a list of names")
            object.__setattr__(self, "numbers", tuple(self.numbers))
            given += self.numbers
        require(all(isinstance(x, str) for x in given), "columns", given, "names of columns")
        require(len(set(given)) == len(given), "columns", given, "each column once")

    @property
    def named(self) -> dict[str, str | None]:
        """The names without those of numbers."""
        fields = ("prompt", "answer", "image", "text", "kind", "split")
        return {field: getattr(self, field) for field in fields}


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    name: a data set of `slam_jax.data.prepare`, with its variant after a slash where it has some.
    data_dir: folder of built data sets; None = $SLAM_JAX_DATA_DIR or ~/.cache/slam_jax/tfds.
    path: for the data set "folder", the folder with the data, or a file of it.
    columns: the columns of a folder or features of a TFDS set that are read.
    mixture: for the data set "folder", pairs (a path or the name of another data set, weight) in
      place of `path`. Rows of training are drawn in proportion to the weights; validation and test
      have all rows of each.
    batch_size: examples per step over all processes.
    seed: of shuffling, rendering and the choice of views.
    resize: how pictures become square, one of `RESIZE_POLICIES`. A pretrained vision tower has
      its own way, and this is not used then.
    augment: training pictures are cropped at random by up to this share of each side; 0 = they
      are shown whole. flip: the probability that they are mirrored left to right. colour: their
      brightness, contrast and saturation are multiplied by random factors from 1 - colour to
      1 + colour. What is drawn depends on (seed, step, row) alone. Not for sort_of_clevr.
    questions: how many of the twenty questions of a sort_of_clevr scene a training example has,
      chosen at random each time; None = all. Evaluation always asks all.
    descriptions, closest_objects: what else a training example of sort_of_clevr is asked for. How
      many of its six objects it describes: "describe red", "circle at 12 40". For how many of them
      it describes the closest one: "describe closest to red", "blue square at 20 44". Evaluation
      asks for none.
    drop_inputs: in training, each input of a row is left out at this rate, but never all of them,
      so that the model learns to answer from any mix; it is evaluated on each mix. Not for
      sort_of_clevr.
    bucket_lengths: texts, and prompts with their answers, are padded to the next power of two of
      tokens in their batch, from 16 on. False = to the longest of the data set. A step is compiled
      once for each length. `default_config` sets True.
    workers: processes that make the batches; 0 = threads of the training process. It changes no
      batch.
    max_damaged_records: how many damaged records of a split are skipped; one more ends the run.
    vocab_size: the largest number of tokens that the tokenizer learns.
    table_version: how the table of a folder is read. 2 = equal pictures are in one split whatever
      their names, answers and kinds are stripped and in Unicode NFC, true and false are read alike
      from every format, and outliers do not count for the scale of numbers. None = as in version
      0.11.0, so that its checkpoints keep their data. `default_config` sets 2.
    stages: pairs (first step, {view: rate}); from that step on, a batch shows a view with
      probability proportional to its rate. Lists, as JSON gives them, are accepted.

    Raises:
      ConfigError: naming the field, if a value cannot be used.
    """

    name: str = "sort_of_clevr"
    data_dir: str | None = None
    path: str | None = None
    batch_size: int = 64
    seed: int = 0
    resize: str = RESIZE_POLICIES[0]
    augment: float = 0.0
    flip: float = 0.0
    colour: float = 0.0
    drop_inputs: float = 0.0
    questions: int | None = None
    bucket_lengths: bool = False
    workers: int = 0
    descriptions: int = 0
    closest_objects: int = 0
    max_damaged_records: int = 10
    vocab_size: int = 512
    table_version: int | None = None
    stages: Sequence[Any] = ((0, {"image": 1.0}),)
    columns: ColumnsConfig = ColumnsConfig()
    mixture: Sequence[Any] = ()

    def __post_init__(self) -> None:
        require_count("batch_size", self.batch_size)
        require_count("vocab_size", self.vocab_size, least=SMALLEST_VOCABULARY)
        require_count("workers", self.workers, least=0, most=256)
        require_count("max_damaged_records", self.max_damaged_records, least=0)
        versions = (None, 2)
        require(self.table_version in versions, "table_version", self.table_version, "None or 2")
        known = f"one of {', '.join(RESIZE_POLICIES)}"
        require(self.resize in RESIZE_POLICIES, "resize", self.resize, known)
        for field in ("flip", "colour"):
            value = getattr(self, field)
            require(0 <= value <= 1, field, value, "a number from 0 (off) to 1")
        require(0 <= self.augment < 1, "augment", self.augment, "a share from 0 to below 1")
        require(0 <= self.drop_inputs < 1, "drop_inputs", self.drop_inputs, "a rate in [0, 1)")
        if self.questions is not None:
            require_count("questions", self.questions, most=20)
        for field in ("descriptions", "closest_objects"):
            require_count(field, getattr(self, field), least=0, most=6)
        require_count("seed", self.seed, least=0, most=2**32 - 1)
        stages = tuple(_stage(i, stage) for i, stage in enumerate(self.stages))
        starts = [stage.first for stage in stages]
        if starts[:1] != [0] or starts != sorted(set(starts)):
            raise ConfigError(f"stages begin at steps {starts}; they must begin at 0 and increase")
        object.__setattr__(self, "stages", stages)
        if not isinstance(self.columns, ColumnsConfig):  # as JSON and ConfigDict give it
            object.__setattr__(self, "columns", ColumnsConfig(**self.columns))
        is_list = isinstance(self.mixture, (list, tuple)) and len(self.mixture) <= _MOST_PARTS
        require(is_list, "mixture", self.mixture, f"a list of at most {_MOST_PARTS} pairs")
        parts = tuple(_part(i, part) for i, part in enumerate(self.mixture))
        object.__setattr__(self, "mixture", parts)

    @property
    def plain(self) -> "DataConfig":
        """The same without random changes of training examples."""
        return dataclasses.replace(self, augment=0.0, flip=0.0, colour=0.0, drop_inputs=0.0)

    @property
    def directory(self) -> pathlib.Path:
        chosen = self.data_dir or os.environ.get("SLAM_JAX_DATA_DIR") or "~/.cache/slam_jax/tfds"
        try:
            return pathlib.Path(chosen).expanduser()
        except RuntimeError:
            raise ConfigError(
                f"data_dir is {chosen!r} and there is no home folder; give data.data_dir or "
                "$SLAM_JAX_DATA_DIR another folder"
            ) from None

    @property
    def views(self) -> tuple[str, ...]:
        """The views that some stage uses, in the order of `TRAINING_VIEWS`."""
        rates = [item for stage in self.stages for item in stage.rates.items()]
        used = {view for view, rate in rates if rate > 0}
        return tuple(view for view in TRAINING_VIEWS if view in used)

    def stage(self, step: int) -> Stage:
        """The stage that contains step `step`."""
        return self.stages[bisect.bisect([stage.first for stage in self.stages], step) - 1]

    def view(self, step: int) -> str:
        """The view of step `step`, drawn at the rates of its stage from (seed, step) alone."""
        rates = self.stage(step).rates
        # Sorted: JSON and ConfigDict do not keep the order in which rates were written.
        names = sorted(rates)
        weights = np.array([rates[name] for name in names])
        rng = np.random.default_rng((self.seed, step))
        return names[rng.choice(len(names), p=weights / weights.sum())]


def _part(i: int, part: Any) -> tuple[str, float]:
    try:
        place, weight = part
        weight = float(weight)
        if not isinstance(place, str) or not 0 < weight <= 1e9:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(
            f'mixture[{i}] is {part!r}; it must be (path or name, weight), such as ("photos", 2.0)'
        ) from None
    return place, weight


def _stage(i: int, stage: Any) -> Stage:
    try:
        first, rates = stage
        first, rates = int(first), {str(view): float(rate) for view, rate in rates.items()}
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise ConfigError(
            f"stages[{i}] is {stage!r}; it must be (first step, {{view: rate}}), "
            'such as (0, {"image": 1.0})'
        ) from None
    check_names(rates, list(TRAINING_VIEWS), f"stages[{i}]: training", "view")
    for view, rate in rates.items():
        require(0 <= rate <= 1e9, f"stages[{i}]: the rate of {view}", rate, "0 to 1e9")
    require(any(rates.values()), f"stages[{i}]", rates, "a view with a rate above 0")
    return Stage(first, rates)
