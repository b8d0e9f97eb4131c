"""What the training loop asks of a kind of run: of SLAM v3, or of a language model.

A task holds the checked configuration of a run and says how its model, data and scores are made.
State, optimizer, checkpoints, mesh and loop are the same for all tasks.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx
from jax.sharding import Mesh

from slam_jax.data.order import Order
from slam_jax.training.base import BaseRecord, Bases
from slam_jax.training.checkpoint import Checkpoints
from slam_jax.training.state import TrainState


class Beside(NamedTuple):
    """What a checkpoint has beside the state; see `Checkpoints.save`.

    data: what identifies the data: its "sha256", if it is known, and the number of rows by split.
    """

    tokenizer: str
    aux: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    data: dict[str, Any] | None = None


@runtime_checkable
class Task(Protocol):
    """A kind of run with its configuration; immutable.

    experiment: a frozen dataclass with the groups `data` (with a `batch_size`), `optimizer`, `run`
      and `mesh`, the field `seed`, and a method `from_config`. num_processes: what the mesh axis
      `process` may divide. init_from: whose weights a new run copies, None = nobody's.
    precision: a context of the whole run. check: raises ConfigError where the groups fit neither
      each other, nor the mesh, nor the data set, where these are given.
    opened: the task with the fields that are read from folders of published parts. old: that of the
      checkpoint to resume from. records: those of its bases, by name.
    stored: a configuration as JSON, with those fields.
    bases: of the model. records: None = those of a new run.
    open_dataset: anything with a `tokenizer`; the other methods get it back. latest: the step to
      resume from; raises CheckpointError where the data are not those of that checkpoint. With
      `changed` they may be others, for which its tokenizer and format of numbers are used. given:
      by the caller of `train`, in place of what the configuration names. introduce: what the run
      uses of it, one line each.
    model: makes the model, called with `rngs`. loss, weight_of: see `make_train_step`.
    batches: endless (view, batch) from a step on, with these rows of each batch, in this order. It
      has `close`.
    num_tokens, flops: of a whole training step, given the batch of one host process.
    validate: scores by name, higher "accuracy" being better. should_stop: is called before each
      batch; where it returns True, `Stopped` is raised. describe: scores in one line.
    """

    @property
    def experiment(self) -> Any: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def init_from(self) -> str | None: ...

    def precision(self) -> contextlib.AbstractContextManager[Any]: ...
    def check(self, mesh: Mesh | None, dataset: Any = None) -> None: ...
    def opened(self, old: Any, records: Mapping[str, BaseRecord]) -> "Task": ...
    def stored(self, config: dict[str, Any]) -> dict[str, Any]: ...
    def bases(self, records: Mapping[str, BaseRecord] | None = None) -> Bases: ...
    def open_dataset(
        self,
        checkpoints: Checkpoints,
        latest: int | None,
        changed: bool = False,
        given: Any = None,
    ) -> Any: ...
    def introduce(self, dataset: Any) -> list[str]: ...
    def beside(self, dataset: Any) -> Beside: ...
    def model(self, vocab_size: int) -> Callable[..., nnx.Module]: ...
    def loss(self, model: Any, batch: Any, *, key: Any = None) -> Any: ...
    def weight_of(self, batch: Any) -> Any: ...
    def batches(
        self, dataset: Any, start_step: int, rows: Sequence[int], order: Order
    ) -> Iterator[tuple[str, Any]]: ...
    def num_tokens(self, batch: Any) -> int: ...
    def flops(self, vocab_size: int, batch: Any) -> int: ...
    def validate(
        self,
        graphdef: nnx.GraphDef,
        state: TrainState,
        dataset: Any,
        should_stop: Callable[[], bool],
    ) -> dict[str, float]: ...
    def describe(self, scores: Mapping[str, float]) -> str: ...
