"""Tools that show the metrics of runs: TensorBoard, Weights & Biases and MLflow.

Each is an extra of the package, and works without a network: it writes to the workdir, unless its
own settings in the environment say where to.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from slam_jax.errors import ConfigError, first_line

_RUN_FILE = "{}.json"  # in the workdir: the run that a resumed run continues


@runtime_checkable
class Tracker(Protocol):
    """Gets every number that is written to the metrics file."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in `WORKDIR/tensorboard` (extra `tracking`)."""

    def __init__(self, workdir: Path, config: Mapping[str, Any], resume_step: int):
        from tensorboardX import SummaryWriter

        folder = str(workdir / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=resume_step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases (extra `wandb`), in the project $WANDB_PROJECT or slam_jax.

    It is offline, in `WORKDIR/wandb`, unless $WANDB_MODE or $WANDB_API_KEY is set; `wandb sync`
    uploads it later. A resumed run continues it.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any], resume_step: int):
        import wandb

        known = _read(workdir, "wandb") or secrets.token_hex(4)
        usual = "online" if "WANDB_API_KEY" in os.environ else "offline"
        mode: Any = os.environ.get("WANDB_MODE", usual)
        with _explained("wandb"):
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "slam_jax"),
                name=workdir.absolute().name,
                id=known,
                resume="allow",
                dir=str(workdir),
                mode=mode,
                config=dict(config),
                settings=wandb.Settings(silent=True),
            )
            # Its own counter only rises, and a resumed run repeats steps.
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        _write(workdir, "wandb", known)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow (extra `mlflow`), in the experiment $MLFLOW_EXPERIMENT_NAME or slam_jax.

    It is stored in $MLFLOW_TRACKING_URI, by default the file `WORKDIR/mlflow.db`. A resumed run
    continues it.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any], resume_step: int):
        connect: Any = importlib.import_module("mlflow.tracking").MlflowClient
        own = f"sqlite:///{(workdir / 'mlflow.db').absolute()}"
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "slam_jax")
        with _explained("mlflow"):
            client = connect(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", own))
            self._client, known = client, _read(workdir, "mlflow")
            if known is None:
                found = client.get_experiment_by_name(name)
                place = found.experiment_id if found else client.create_experiment(name)
                known = client.create_run(place, run_name=workdir.absolute().name).info.run_id
                for field, value in _flat(config).items():
                    client.log_param(known, field, str(value)[:500])
            else:
                client.update_run(known, status="RUNNING")
        self._id = known
        _write(workdir, "mlflow", self._id)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._client.log_metric(self._id, name, number, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
_PACKAGES = {
    "tensorboard": ("tensorboardX", "tracking"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}


def require_packages(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker whose package is not installed."""
    for name in names:
        package, extra = _PACKAGES[name]
        if sys.modules.get(package, ...) is None or importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"run.trackers has {name!r}, which needs {package}: `pip install "
                f"'slam_jax[{extra}]'`, or leave it out"
            )


def open_trackers(
    names: Sequence[str], workdir: Path, config: Mapping[str, Any], resume_step: int
) -> list[Tracker]:
    """The trackers of these names. Raises ConfigError where one cannot start."""
    return [TRACKERS[name](workdir, config, resume_step) for name in names]


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each has its own error types
        raise ConfigError(
            f"run.trackers has {name!r}, which cannot start ({first_line(error)}); check its "
            "settings, or leave it out"
        ) from error


def _read(workdir: Path, name: str) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads((workdir / _RUN_FILE.format(name)).read_text())["id"])
    return None


def _write(workdir: Path, name: str, run_id: str) -> None:
    (workdir / _RUN_FILE.format(name)).write_text(json.dumps({"id": run_id}) + "\n")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of nested groups by names such as "data.batch_size"."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        inside = isinstance(value, Mapping) and value
        found |= _flat(value, f"{prefix}{name}.") if inside else {f"{prefix}{name}": value}
    return found
