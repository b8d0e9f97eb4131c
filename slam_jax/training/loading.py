"""Loads a trained model: of a checkpoint, or from a folder that was made to be shared."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from slam_jax.data import AnyTokenizer, AuxFormat, load_tokenizer, tokenizer_from_json
from slam_jax.data.images import RESIZE_POLICIES
from slam_jax.generation.requests import ModelAndTokenizer
from slam_jax.interop.pretrained import is_published, load_pretrained
from slam_jax.layers.quantization import quantize
from slam_jax.runtime.memory import explain_out_of_memory
from slam_jax.slam_v3 import SlamV3
from slam_jax.trained.folder import Trained, find_folder, read_folder, read_weights
from slam_jax.training.base import load_bases, locate, provided_by
from slam_jax.training.checkpoint import CheckpointError, Checkpoints, Step
from slam_jax.training.checkpoint.trees import by_name, from_names
from slam_jax.training.experiment import Experiment, is_language
from slam_jax.training.kinds import task_of
from slam_jax.training.sharding import with_shardings
from slam_jax.training.state import merge_model, split_model
from slam_jax.training.task import Task
from slam_jax.training.trainable import merge, split_of

_USUAL_ANSWER = 512  # tokens of an answer of a language model, unless it ends before


class Loaded(NamedTuple):
    """A trained model with everything needed to use it.

    config: the configuration of its run as nested dicts. aux_format: the names and scales of its
    auxiliary vectors, None where they have no names. step: of its checkpoint. max_new_tokens: the
    default length of answers, which the longest answer of the training data fits into.
    """

    model: SlamV3
    tokenizer: AnyTokenizer
    aux_format: AuxFormat | None
    config: dict[str, Any]
    step: int
    max_new_tokens: int = 32

    @property
    def resize(self) -> str:
        """How the run made pictures square, one of `RESIZE_POLICIES`."""
        return self.config.get("data", {}).get("resize", RESIZE_POLICIES[0])


@dataclasses.dataclass(frozen=True)
class LoadedLanguageModel(ModelAndTokenizer):
    """The language model of a run. config: of the run as nested dicts. step: of its checkpoint."""

    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    step: int = 0


def load(
    workdir: str | Path,
    step: Step = None,
    base: Sequence[str | Path] = (),
    *,
    weights: str | None = None,
) -> Any:
    """A model and its tokenizer, ready for `slam_jax.generate`.

    workdir: of a run, which gives a `Loaded`, or for a language model a `ModelAndTokenizer`, with
    averaged parameters where the run averaged them; or a folder that `save_pretrained` wrote; or
    "quickstart", a model that comes with the package; or a published language model, the folder or
    the GGUF file, which gives a `ModelAndTokenizer`.
    step: a number, "latest", "best", or None for the best; a folder
    has one step. base: folders in which to look first for base weights that the checkpoint names.
    weights: "float32", "bfloat16" or "int8", as `slam_jax.quantize` takes them; None = as stored.
    Only arrays and JSON are read; nothing is executed.

    Raises:
      CheckpointError: there is no such workdir or step, or it does not fit its configuration.
      InputError: the folder is damaged, or base weights are missing or were changed.
      OutOfMemory: the model does not fit.
    """
    return quantize(_load(workdir, step, base), weights)


def _load(workdir: str | Path, step: Step, base: Sequence[str | Path]) -> Any:
    """A model with its weights as they are stored."""
    if is_published(workdir):
        return _load_published(workdir)
    folder, saved = find_folder(workdir), read_saved(workdir, step)
    tokenizer = tokenizer_from_json(saved.tokenizer)
    if is_language(saved.config):
        return _load_language(workdir, saved, tokenizer, base)
    aux_format = None if saved.aux is None else AuxFormat.from_json(saved.aux)
    experiment = Experiment.from_config(saved.config)
    sizes = experiment.with_vocabulary(tokenizer.vocab_size)
    stored = None if saved.weights == "float32" else saved.weights
    model = nnx.eval_shape(lambda: quantize(SlamV3(sizes, rngs=nnx.Rngs(0)), stored))
    graphdef, like = split_model(model)
    with explain_out_of_memory("the model", "load it on a larger machine"):
        if folder is not None:
            weights = read_weights(folder, by_name(like))
            params = from_names(weights, like)
        else:
            params = _restore(Checkpoints(workdir), saved.step, task_of(saved.config), like, base)
        params = jax.device_put(params)
    return Loaded(
        merge_model(graphdef, params),
        tokenizer,
        aux_format,
        saved.config,
        saved.step,
        max(32, saved.max_new_tokens),
    )


def _load_published(path: str | Path) -> ModelAndTokenizer:
    """A language model as its publisher made it, with its tokenizer."""
    with explain_out_of_memory("the model", "load it on a larger machine"):
        model, config = load_pretrained(path)
    most = min(_USUAL_ANSWER, max(1, config.context_length // 2))
    return ModelAndTokenizer(model, load_tokenizer(path), max_new_tokens=most)


def _load_language(
    workdir: str | Path, saved: Trained, tokenizer: AnyTokenizer, base: Sequence[str | Path]
) -> LoadedLanguageModel:
    """The language model of a run, with its adapters."""
    task = task_of(saved.config)
    graphdef, like = split_model(
        nnx.eval_shape(lambda: task.model(tokenizer.vocab_size)(rngs=nnx.Rngs(0)))
    )
    with explain_out_of_memory("the model", "load it on a larger machine"):
        params = _restore(Checkpoints(workdir), saved.step, task, like, base)
        model: Any = merge_model(graphdef, jax.device_put(params))
    most = saved.max_new_tokens or min(_USUAL_ANSWER, max(1, model.config.context_length // 2))
    more: Any = dict(config=saved.config, step=saved.step)
    return LoadedLanguageModel(model, tokenizer, max_new_tokens=max(32, most), **more)


def _restore(
    checkpoints: Checkpoints,
    step: int,
    task: Task,
    shapes: Any,
    moved: Sequence[str | Path],
) -> Any:
    """All parameters of a checkpoint, of those that train their average where there is one."""
    bases, optimizer = (
        task.bases(locate(checkpoints.read_bases(step), moved)),
        task.experiment.optimizer,
    )
    split = split_of(shapes, optimizer, provided_by(bases))
    trained, frozen = split.of(split.shapes)
    part = "params" if optimizer.ema_decay is None else "ema"
    like = {part: trained}
    if stored := split.stored(frozen):
        like["frozen"] = stored
    restored = checkpoints.restore(step, like, partial=True)
    provided = load_bases(bases, with_shardings(frozen, None))
    return merge(restored[part], merge(restored.get("frozen"), provided))


def read_saved(workdir: str | Path, step: Step = None) -> Trained:
    """What `load` reads besides the weights; the same arguments and errors."""
    folder = find_folder(workdir)
    if folder is not None:
        saved = read_folder(folder)
        if str(step) not in ("None", "best", "latest", str(saved.step)):
            raise CheckpointError(f"{folder} has step {saved.step} alone; leave out step {step}")
        return saved
    checkpoints = Checkpoints(workdir)
    found = checkpoints.resolve(step)
    return Trained(
        config=checkpoints.read_config(found),
        step=found,
        max_new_tokens=checkpoints.read_generation(found).get("max_new_tokens", 0),
        aux=checkpoints.read_aux(found),
        tokenizer=checkpoints.read_tokenizer(found),
    )
