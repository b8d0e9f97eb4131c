"""The configuration of a run: from a ConfigDict, JSON or flags to frozen, checked dataclasses."""

import ast
import copy
import dataclasses
import json
import runpy
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from slam_jax.data import TRAINING_VIEWS, DataConfig, Dataset
from slam_jax.errors import ConfigError, check_names, require, require_count
from slam_jax.evaluation.scores import EXACT_MATCH, check_metrics
from slam_jax.slam_v3 import SlamV3Config
from slam_jax.slam_v3.config import PRESETS
from slam_jax.training import recipes
from slam_jax.training.losses import LossConfig
from slam_jax.training.mesh import MeshConfig
from slam_jax.training.optimizer import OptimizerConfig
from slam_jax.training.removed_fields import without_removed
from slam_jax.training.tracking import TRACKERS

_LARGEST = 1e300  # sums and products of numbers below it rarely overflow float64


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long a run is, and how often it logs, evaluates and saves.

    num_steps: steps of the whole run. log_every: steps between two lines of the metrics file.
    evaluate_every: steps between evaluations on the validation split; a checkpoint follows each.
    evaluate_views: the views to evaluate, of `TRAINING_VIEWS`; () = those that the run trains on.
    metrics: the scores of `eval.py`, of `slam_jax.evaluation.METRICS`; accuracy, which is
    "exact_match", is always one of them.
    evaluate_batches: batches per view, None = the whole split. They are a random sample of it, the
    same in each evaluation. They are split into `optimizer.accumulate_steps` parts, as training
    batches are.
    best_metric: the score that chooses the best checkpoint, by its name among those that an
    evaluation prints: "accuracy"; "loss", of which the lowest is best; or one of a view, such as
    "loss/image" or "image/relational". Of equal ones the later is best.
    save_every: steps between checkpoints besides those of evaluations, None = no others.
    keep_every: checkpoints at multiples of it are kept for good; None = only the last two and the
    best are kept.
    max_bad_steps: steps whose loss or gradient is not finite are skipped. After this many in a row
    the run goes back to its last checkpoint before them; after twice as many it stops.
    trackers: tools that get the metrics too, of "tensorboard", "wandb" and "mlflow"; see
    `slam_jax.training.tracking`. tensorboard: True is the same as "tensorboard" among them.
    init_from: the weights that a new run begins with: the workdir of another run, of which its best
    checkpoint counts, or a folder that `python -m slam_jax.trained` wrote, or "quickstart"; None =
    random ones. A resumed run does not read it.
    prng_impl: what draws dropout: "threefry2x32"; or "rbg", which JAX documents as faster on TPUs,
    but whose numbers may change with the number of devices and with the version of XLA.
    """

    num_steps: int = 1_000
    log_every: int = 20
    evaluate_every: int = 500
    evaluate_views: tuple[str, ...] = ()
    evaluate_batches: int | None = None
    best_metric: str = "accuracy"
    save_every: int | None = None
    keep_every: int | None = None
    max_bad_steps: int = 20
    tensorboard: bool = False
    trackers: tuple[str, ...] = ()
    prng_impl: str = "threefry2x32"
    init_from: str | None = None
    metrics: tuple[str, ...] = (EXACT_MATCH,)

    def __post_init__(self):
        for field in ("evaluate_views", "trackers", "metrics"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        check_names(self.trackers, list(TRACKERS), "run.trackers", "tracker")
        check_metrics(self.metrics, installed=False)
        # One half of a split scene has no score of its own, so it is not a training view.
        views = list(TRAINING_VIEWS)
        check_names(self.evaluate_views, views, "run.evaluate_views: training", "view")
        for field in ("num_steps", "log_every", "evaluate_every", "max_bad_steps"):
            require_count(f"run.{field}", getattr(self, field), most=2**31 - 1)
        for field in ("evaluate_batches", "save_every", "keep_every"):
            value = getattr(self, field)
            require(value is None or value >= 1, f"run.{field}", value, "None or at least 1")
        known = ("threefry2x32", "rbg")
        require(self.prng_impl in known, "run.prng_impl", self.prng_impl, f"one of {known}")

    @property
    def all_trackers(self) -> tuple[str, ...]:
        """Those of both fields, each once."""
        board = ("tensorboard",) if self.tensorboard else ()
        return tuple(dict.fromkeys((*self.trackers, *board)))

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation and a checkpoint follow step `step`."""
        return step % self.evaluate_every == 0 or step == self.num_steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint without an evaluation follows step `step`."""
        return self.save_every is not None and step % self.save_every == 0


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The configuration of a whole run.

    seed: of the initial parameters and of dropout. model: with a vocabulary of 1 until the
    tokenizer is known; see `with_vocabulary`.
    """

    seed: int
    model: SlamV3Config
    data: DataConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    run: RunConfig
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        require_count("seed", self.seed, least=0, most=2**32 - 1)
        self.check()

    def check(self, mesh: Mesh | None = None, dataset: Dataset | None = None) -> None:
        """Raises ConfigError where fields of different groups do not fit together.

        mesh, dataset: those of the run, or None; the configuration is also checked against them.
        Each group checks its own fields, `make_mesh` the number of devices, and
        `slam_jax.data.prepare` whether the model can read the records.
        """
        parts = self.optimizer.accumulate_steps
        require_even_batch("data.batch_size", self.data.batch_size, parts, mesh)
        self._check_best_metric()
        if mesh is not None:
            processes, groups = self.model.num_processes, mesh.shape["process"]
            even = f"a divisor of model.num_processes={processes}"
            require(processes % groups == 0, "mesh.process", groups, even)
        if dataset is not None:
            views, known = self.run.evaluate_views, list(dataset.validation.views)
            check_names(views, known, "run.evaluate_views: the data set", "view")

    def _check_best_metric(self) -> None:
        """The kinds of questions are known after the first evaluation, the views before."""
        views = self.run.evaluate_views or self.data.views
        first, _, rest = self.run.best_metric.partition("/")
        expected = "accuracy, loss, loss/VIEW or VIEW/KIND with VIEW among " + ", ".join(views)
        known = (first in ("accuracy", "loss") and not rest) or (first == "loss" and rest in views)
        known |= first in views and bool(rest)
        require(known, "run.best_metric", self.run.best_metric, expected)

    @classmethod
    def from_config(cls, config: ConfigDict | Mapping[str, Any]) -> "Experiment":
        """An experiment from nested mappings. Raises ConfigError, naming a field that is wrong."""
        values = without_removed(as_json(config))
        if isinstance(values.get("model"), Mapping):
            values["model"] = {"vocab_size": 1, **values["model"]}
        return build(cls, values, "")

    def with_vocabulary(self, vocab_size: int) -> SlamV3Config:
        """The model's configuration for a tokenizer of `vocab_size` tokens."""
        return dataclasses.replace(self.model, vocab_size=vocab_size)


def require_even_batch(field: str, batch_size: int, parts: int, mesh: Mesh | None) -> None:
    """Raises ConfigError unless every part of the batch gives each device as many examples.

    field: the name of the batch size. parts: `OptimizerConfig.accumulate_steps`.
    """
    even = f"a divisor of {field}={batch_size}"
    require(batch_size % parts == 0, "optimizer.accumulate_steps", parts, even)
    if mesh is not None:
        parts *= mesh.shape["data"] * mesh.shape["fsdp"]
        even = f"a multiple of {parts}, optimizer.accumulate_steps times mesh.data times mesh.fsdp"
        require(batch_size % parts == 0, field, batch_size, even)


def is_language(config: ConfigDict | Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a language model; else it is that of a SLAM v3."""
    return isinstance(config.get("language_model"), (ConfigDict, Mapping))


def default_config(preset: str = "small") -> ConfigDict:
    """All fields of a configuration; a file in configs/ starts from it and changes some.

    `preset` is one of `slam_jax.slam_v3.config.PRESETS`. None means "derived" or "off". The
    vocabulary size is no field, as the tokenizer has it. Raises ConfigError for another preset.
    """
    require(preset in PRESETS, "preset", preset, f"one of {', '.join(PRESETS)}")
    model = SlamV3Config.preset(preset, vocab_size=1)
    # Not the defaults of the fields: a stored configuration that lacks them means the others.
    data = DataConfig(table_version=2, bucket_lengths=True)
    groups = Experiment(0, model, data, LossConfig(), OptimizerConfig(), RunConfig())
    config = dataclasses.asdict(groups)
    del config["model"]["vocab_size"]
    config["data"]["stages"] = DataConfig.stages
    return ConfigDict(config)


def read_config(name: str | Path) -> dict[str, Any]:
    """The result of `get_config()` of a Python file, as JSON would hold it. The file is executed.

    name: the path of the file, or the name of a recipe, such as quickstart. Raises ConfigError
    where there is neither, the file has no such function, or it fails.
    """
    path = recipes.find(name)
    try:
        config = runpy.run_path(str(path))["get_config"]()
        if not isinstance(config, (ConfigDict, Mapping)):
            raise TypeError(f"it returns a {type(config).__name__}, expected groups of fields")
        return as_json(config)
    except Exception as error:  # a user's own code may fail in any way
        reason = (str(error).strip() or "it failed").splitlines()[0]
        raise ConfigError(f"{path}: get_config: {type(error).__name__}: {reason}") from error


def as_json(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as checkpoints store it: dicts, lists, numbers and strings."""
    plain = config.to_dict() if isinstance(config, ConfigDict) else config
    return json.loads(json.dumps(plain))


def build(cls: type, values: Mapping[str, Any], group: str = "") -> Any:
    """The dataclass `cls` from nested mappings, with its field types checked.

    Raises ConfigError, naming the field after its `group`.
    """
    types_of = typing.get_type_hints(cls)
    check_names(values, list(types_of), group.rstrip(".") or "the config")
    built = {}
    for field in dataclasses.fields(cls):
        name, kind = field.name, types_of[field.name]
        if name not in values:
            require(field.default is not dataclasses.MISSING, group + name, None, "a value")
        elif dataclasses.is_dataclass(kind):
            is_group = isinstance(values[name], Mapping)
            require(is_group, group + name, values[name], "a group of fields")
            built[name] = build(types_of[name], values[name], f"{group}{name}.")
        else:
            require(_fits(values[name], kind), group + name, values[name], _describe(kind))
            built[name] = values[name]
    try:
        return cls(**built)
    except ConfigError as error:
        # The dataclass may name its own group: "image.size", "optimizer.b1".
        above, _, own = group.rstrip(".").rpartition(".")
        named = bool(own) and str(error).startswith(f"{own}.")
        prefix = (f"{above}." if above else "") if named else group
        raise ConfigError(f"{prefix}{error}") from None


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON can be a field of this type; a list fits any sequence."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, (int, float)) and -_LARGEST <= value <= _LARGEST
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, (list, tuple)) and all(_fits(x, arguments[0]) for x in value)
    return isinstance(value, origin or kind)


def _describe(kind: Any) -> str:
    options = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    names = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    names[type(None)] = "None"
    return " or ".join(names.get(option, "a list") for option in options)


def override(config: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """A copy of the configuration with `--config.group.field=value` arguments applied.

    Values are Python literals; anything else is text, and so is every value of a field of text,
    such as the path 2024. Raises ConfigError for an argument of another form and for a field that
    the configuration does not have.
    """
    changed = copy.deepcopy(dict(config))
    for argument in arguments:
        path, equals, text = argument.lstrip("-").partition("=")
        root, *names = path.split(".")
        if root != "config" or not names or not equals:
            raise ConfigError(f"argument {argument!r}; expected --config.field=value")
        group: Any = changed
        kind: Any = _experiment_type(changed)
        for i, name in enumerate(names):
            known = list(group) if isinstance(group, dict) else []
            check_names([name], known, ".".join(names[:i]) or "the config")
            kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
            if i < len(names) - 1:
                group = group[name]
        value = _literal(text)
        is_text = str in (kind, *typing.get_args(kind)) and not _fits(value, kind)
        group[names[-1]] = text if is_text else value
    return changed


def _experiment_type(config: Mapping[str, Any]) -> type:
    if is_language(config):
        from slam_jax.training.language_experiment import LanguageExperiment  # it imports this one

        return LanguageExperiment
    return Experiment


def _literal(text: str) -> Any:
    """The value of a Python literal that JSON can hold; any other text as it is."""
    try:
        return json.loads(json.dumps(ast.literal_eval(text)))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text
