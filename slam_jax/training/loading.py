"""Loads the model of a checkpoint."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from slam_jax.data import AuxFormat, Tokenizer
from slam_jax.runtime.memory import explain_out_of_memory
from slam_jax.slam_v3 import SlamV3
from slam_jax.training.checkpoint import Checkpoints, Step
from slam_jax.training.experiment import Experiment
from slam_jax.training.state import merge_model, split_model


class Loaded(NamedTuple):
    """A trained model with everything needed to use it.

    config: the configuration of its run as nested dicts. aux_format: the names and scales of its
    auxiliary vectors, None where they have no names. step: of its checkpoint. max_new_tokens: the
    default length of answers, which the longest answer of the training data fits into.
    """

    model: SlamV3
    tokenizer: Tokenizer
    aux_format: AuxFormat | None
    config: dict[str, Any]
    step: int
    max_new_tokens: int = 32


def load(workdir: str | Path, step: Step = None) -> Loaded:
    """The model of a checkpoint, with averaged parameters where the run averaged them.

    step: a number, "latest", "best", or None for the best. Only arrays and JSON are read; nothing
    from the workdir is executed.

    Raises:
      CheckpointError: there is no such workdir or step, or it does not fit its configuration.
      OutOfMemory: the model does not fit.
    """
    checkpoints = Checkpoints(workdir)
    found = checkpoints.resolve(step)
    config, aux = checkpoints.read_config(found), checkpoints.read_aux(found)
    tokenizer = Tokenizer.from_json(checkpoints.read_tokenizer(found))
    aux_format = None if aux is None else AuxFormat.from_json(aux)
    experiment = Experiment.from_config(config)
    sizes = experiment.with_vocabulary(tokenizer.vocab_size)
    model = nnx.eval_shape(lambda: SlamV3(sizes, rngs=nnx.Rngs(0)))
    graphdef, like = split_model(model)
    part = "params" if experiment.optimizer.ema_decay is None else "ema"
    with explain_out_of_memory("the model", "load it on a larger machine"):
        params = jax.device_put(checkpoints.restore_subtree(found, part, like))
    longest = max(32, checkpoints.read_generation(found).get("max_new_tokens", 0))
    return Loaded(merge_model(graphdef, params), tokenizer, aux_format, config, found, longest)
