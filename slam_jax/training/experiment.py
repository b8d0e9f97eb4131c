"""The door at which a ConfigDict stops: beyond it there are frozen, checked dataclasses only."""

import ast
import copy
import dataclasses
import json
import runpy
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from slam_jax.data import TRAINING_VIEWS, DataConfig
from slam_jax.errors import ConfigError, check_names, require, require_count
from slam_jax.slam_v3 import SlamV3Config
from slam_jax.slam_v3.config import PRESETS
from slam_jax.training.losses import LossConfig
from slam_jax.training.mesh import MeshConfig
from slam_jax.training.optimizer import OptimizerConfig

_LARGEST = 1e300  # a number that is not far too large is finite after any sum or product


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """num_steps: steps of the whole run. log_every: steps between lines of the metrics file.
    evaluate_every: steps between evaluations on the validation split, each followed by a
    checkpoint. evaluate_views: those of `TRAINING_VIEWS` that are evaluated then; () = those that
    the run trains on.
    evaluate_batches: batches a view, None = the whole split; they are taken in as many parts as
    those of training.
    save_every: steps between checkpoints besides those of evaluations, None = no others.
    keep_every: checkpoints at its multiples are kept for good, None = only the last two and the
    best.
    max_bad_steps: after so many steps in a row whose loss or gradient is not finite (each is
    skipped) the run goes back to its last checkpoint before them; after twice as many it stops.
    tensorboard: write event files too (extra `tracking`).
    """

    num_steps: int = 1_000
    log_every: int = 20
    evaluate_every: int = 500
    evaluate_views: tuple[str, ...] = ()
    evaluate_batches: int | None = None
    save_every: int | None = None
    keep_every: int | None = None
    max_bad_steps: int = 20
    tensorboard: bool = False

    def __post_init__(self):
        object.__setattr__(self, "evaluate_views", tuple(self.evaluate_views))
        # The half of a split scene is only asked what needs both: it has no score of its own.
        known = list(TRAINING_VIEWS)
        check_names(self.evaluate_views, known, "run.evaluate_views: training", "view")
        for field in ("num_steps", "log_every", "evaluate_every", "max_bad_steps"):
            require_count(f"run.{field}", getattr(self, field), most=2**31 - 1)
        for field in ("evaluate_batches", "save_every", "keep_every"):
            value = getattr(self, field)
            require(value is None or value >= 1, f"run.{field}", value, "None or at least 1")

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation and a checkpoint follow step `step`."""
        return step % self.evaluate_every == 0 or step == self.num_steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint alone does."""
        return self.save_every is not None and step % self.save_every == 0


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole run. seed: of the parameters and of dropout.

    The model's vocabulary is 1 until the tokenizer is known: see `with_vocabulary`.
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
        batch, parts = self.data.batch_size, self.optimizer.accumulate_steps
        even = f"a divisor of data.batch_size={batch}"
        require(batch % parts == 0, "optimizer.accumulate_steps", parts, even)

    @classmethod
    def from_config(cls, config: ConfigDict | Mapping[str, Any]) -> "Experiment":
        """Raises ConfigError, naming the field, for whatever cannot be built."""
        values = as_json(config)
        if isinstance(values.get("model"), Mapping):
            values["model"] = {"vocab_size": 1, **values["model"]}
        return build(cls, values, "")

    def with_vocabulary(self, vocab_size: int) -> SlamV3Config:
        """The model's configuration for a tokenizer of `vocab_size` tokens."""
        return dataclasses.replace(self.model, vocab_size=vocab_size)


def default_config(preset: str = "small") -> ConfigDict:
    """Every field a config may have; a file in configs/ starts from it and changes some.

    `preset` is one of `slam_jax.slam_v3.config.PRESETS`. None stands for "derived" or "off". The
    vocabulary is the tokenizer's and no field. Raises ConfigError for another preset.
    """
    require(preset in PRESETS, "preset", preset, f"one of {', '.join(PRESETS)}")
    model = _defaults(SlamV3Config)
    del model["vocab_size"]
    image = {**model["image"], **PRESETS[preset].get("image", {})}
    parts = {
        "data": DataConfig,
        "loss": LossConfig,
        "optimizer": OptimizerConfig,
        "run": RunConfig,
        "mesh": MeshConfig,
    }
    return ConfigDict(
        {
            "seed": 0,
            "model": {**model, **PRESETS[preset], "image": image},
            **{name: _defaults(part) for name, part in parts.items()},
        },
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """What `get_config()` of a Python file returns, as JSON would hold it. The file is run.

    Raises ConfigError where there is no such file, or no such function in it, or it fails.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; give one such as configs/slam_v3_quickstart.py")
    try:
        config = runpy.run_path(str(path))["get_config"]()
        if not isinstance(config, (ConfigDict, Mapping)):
            raise TypeError(f"it returns a {type(config).__name__}, expected groups of fields")
        return as_json(config)
    except Exception as error:  # a user's own code may fail in any way
        reason = (str(error).strip() or "it failed").splitlines()[0]
        raise ConfigError(f"{path}: get_config: {type(error).__name__}: {reason}") from error


def as_json(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as it stands beside a checkpoint: dicts, lists, numbers and texts."""
    plain = config.to_dict() if isinstance(config, ConfigDict) else config
    return json.loads(json.dumps(plain))


def flatten(config: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """Nested groups as one level of dotted names."""
    flat = {}
    for name, value in config.items():
        inner = isinstance(value, Mapping)
        flat |= flatten(value, f"{group}{name}.") if inner else {group + name: value}
    return flat


def _defaults(cls: type) -> dict[str, Any]:
    """The defaults as written, before a class derives values from them; None keeps its type."""
    types, defaults = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        value = None if field.default is dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(value):
            value = _defaults(type(value))
        elif value is None:
            value = placeholder(next(t for t in (*typing.get_args(types[field.name]), int) if t))
        defaults[field.name] = value
    return defaults


def build(cls: type, values: Mapping[str, Any], group: str = "") -> Any:
    """The dataclass `cls` from nested mappings, its field types checked.

    Raises ConfigError, naming the field after its `group`.
    """
    types = typing.get_type_hints(cls)
    check_names(values, list(types), group.rstrip(".") or "the config")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            require(isinstance(value, Mapping), group + name, value, "a group of fields")
            built[name] = build(types[name], value, f"{group}{name}.")
        else:
            require(_fits(value, types[name]), group + name, value, _describe(types[name]))
            built[name] = value
    required = [
        field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
    ]
    for name in required:
        require(name in built, group + name, None, "a value")
    try:
        return cls(**built)
    except ConfigError as error:
        # The dataclass may name its own group: "image.size", "optimizer.b1".
        above, _, own = group.rstrip(".").rpartition(".")
        named = bool(own) and str(error).startswith(f"{own}.")
        prefix = (f"{above}." if above else "") if named else group
        raise ConfigError(f"{prefix}{error}") from None


def _fits(value: Any, kind: Any) -> bool:
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return -_LARGEST <= value <= _LARGEST  # what is not a number fails both
        if origin is int and isinstance(value, bool):
            continue
        if isinstance(origin, type) and issubclass(origin, Sequence) and origin is not str:
            # JSON has lists only.
            element = typing.get_args(option)[0]
            if isinstance(value, (list, tuple)):
                return element is Any or all(_fits(each, element) for each in value)
        elif isinstance(value, origin):
            return True
    return False


def _is_union(kind: Any) -> bool:
    return type(None) in typing.get_args(kind)


def _describe(kind: Any) -> str:
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    names = {
        type(None): "None",
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "True or False",
    }
    return " or ".join(names.get(option, "a list") for option in options)


def override(config: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The configuration with `--config.group.field=value` arguments applied.

    Values are Python literals, or else text. Raises ConfigError for an argument of another form and
    for a field that the configuration does not have.
    """
    changed = copy.deepcopy(dict(config))
    for argument in arguments:
        path, equals, text = argument.lstrip("-").partition("=")
        first, *groups = path.split(".")
        if first != "config" or not groups or not equals:
            raise ConfigError(f"argument {argument!r}; expected --config.field=value")
        target = changed
        for i, name in enumerate(groups):
            known = list(target) if isinstance(target, dict) else []
            check_names([name], known, ".".join(groups[:i]) or "the config")
            if i < len(groups) - 1:
                target = target[name]
        target[groups[-1]] = _literal(text)
    return changed


def _literal(text: str) -> Any:
    """A Python literal that JSON can hold, too; anything else is text."""
    try:
        return json.loads(json.dumps(ast.literal_eval(text)))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text
