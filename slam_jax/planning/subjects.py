"""What is planned: the training step of a run, of SLAM v3 or of a language model."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from slam_jax.data import Batch, prepare, training_batches
from slam_jax.data.packing import TextBatch
from slam_jax.errors import require_count
from slam_jax.kernels.backend import for_accelerators
from slam_jax.language_models.flops import training_flops
from slam_jax.language_models.registry import make_config, make_model
from slam_jax.language_models.slam_v3_text import SlamV3TextConfig
from slam_jax.layers.lora import LoraConfig
from slam_jax.slam_v3 import SlamV3
from slam_jax.slam_v3.flops import num_memory
from slam_jax.training.base import provided_by
from slam_jax.training.experiment import (
    Experiment,
    as_json,
    build,
    is_language,
    require_even_batch,
)
from slam_jax.training.flops import forward_flops, input_sizes, is_aligned
from slam_jax.training.language_experiment import LanguageExperiment
from slam_jax.training.language_task import LanguageTask, make_adapted
from slam_jax.training.losses import language_model_loss, num_answer_tokens, slam_v3_loss
from slam_jax.training.mesh import MeshConfig
from slam_jax.training.optimizer import OptimizerConfig
from slam_jax.training.pretrained import bases_of, with_pretrained
from slam_jax.training.start import abstract_state, jit_train_step
from slam_jax.training.state import TrainState, TrainStep

_NUM_STEPS = 1_000  # of the learning rate's schedule; no figure depends on it


class Depth(NamedTuple):
    """Layers of one kind: `first` others, then `repeats` times a period of `period` layers."""

    first: int
    period: int
    repeats: int

    def layers(self, repeats: int) -> int:
        return self.first + self.period * repeats


class Flops(NamedTuple):
    """Floating-point operations of a step on the whole batch, and those of the processes alone."""

    total: int
    process: int = 0

    def of_device(self, sizes: Mapping[str, int], num_heads: int, rows: int) -> float:
        """The part of one device; devices along an axis that divides nothing repeat the work.

        rows: examples of one part of the batch. `data`, `fsdp` and `process` divide them, `process`
        inside the processes these instead; and `tensor` all products if it divides the heads.
        """
        tensor, processes = sizes.get("tensor", 1), sizes.get("process", 1)
        even = sizes.get("data", 1) * sizes.get("fsdp", 1)
        parts = even * (1 if num_heads % tensor else tensor)
        rest = self.total - self.process
        rest /= processes if rows % (even * processes) == 0 else 1
        return (rest + self.process / processes) / parts


@dataclasses.dataclass(frozen=True)
class Subject:
    """The training of a model, of which a plan is made.

    make: (config, rngs=) -> the model. loss: (model, batch, key=) -> the parts of the loss.
    weight_of: of a part of the batch; see `make_train_step`. batch: shapes of a whole batch.
    require_even: raises ConfigError where the devices of a mesh cannot share a batch evenly.
    depths: name of a field of `config` -> its layers. Without them the model is compiled whole.
    flops: with four forward passes where `remat` is "layers", else three.
    stream_bytes: the whole batch's activations between layers: encoder tokens, all layers.
    num_processes: what the axis `process` may divide. view: of the batch, where there are views.
    provided: shapes and dtypes of the parameters of published parts, by name.
    """

    config: Any
    make: Callable[..., nnx.Module]
    loss: Callable[..., Any]
    weight_of: Callable[[Any], Any]
    batch: Any
    optimizer: OptimizerConfig
    mesh: MeshConfig
    require_even: Callable[[Mesh | None], None]
    depths: Mapping[str, Depth]
    flops: Flops
    stream_bytes: tuple[int, int]
    num_processes: int = 1
    view: str | None = None
    provided: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def patterns(self) -> tuple[str, ...]:
        """All patterns of parameter paths."""
        lora = getattr(self.config, "lora", LoraConfig()).patterns
        return (*self.optimizer.train, *self.optimizer.freeze, *lora)

    def with_layers(self, layers: Mapping[str, int]) -> "Subject":
        """The same with other numbers of layers, by the names of `depths`; `flops` and
        `stream_bytes` remain those of the whole model. No layers are stacked, so that each further
        layer adds as much as the one before."""
        config = dataclasses.replace(self.config, scan_layers=False)
        for name, count in layers.items():
            group, _, field = name.rpartition(".")
            part = getattr(config, group) if group else config
            part = dataclasses.replace(part, **{field: count})
            config = dataclasses.replace(config, **{group: part}) if group else part
        return dataclasses.replace(self, config=config)

    def flops_of_device(self, sizes: Mapping[str, int]) -> float:
        """Operations of one device of a mesh with these sizes."""
        rows = jax.tree.leaves(self.batch)[0].shape[0] // self.optimizer.accumulate_steps
        return self.flops.of_device(sizes, self.config.num_heads, rows)

    @functools.cached_property
    def state(self) -> tuple[nnx.GraphDef, TrainState]:
        """The structure of the model, and the shapes of the training state."""
        make = functools.partial(self.make, self.config)
        return abstract_state(make, self.optimizer, _NUM_STEPS, provided=self.provided)

    def step(self, graphdef: nnx.GraphDef, state: TrainState) -> TrainStep:
        """The jitted training step for a state with these shardings."""
        arguments = graphdef, state, self.loss, self.optimizer, _NUM_STEPS, self.weight_of
        return jit_train_step(*arguments, zero=self.mesh.zero)


def slam_v3_run(
    experiment: Experiment, vocab_size: int, batch: Batch, view: str | None = None
) -> Subject:
    """A run of `train` on batches of one view, of these shapes."""
    model, sizes = experiment.with_vocabulary(vocab_size), input_sizes(batch.inputs)
    model = _for_accelerators(model)

    def forward(num_process_layers: int) -> int:
        config = dataclasses.replace(model, num_process_layers=num_process_layers)
        return forward_flops(config, experiment.loss, batch)

    rows, prompts, length = batch.tokens.shape
    layers, decoder_layers = model.num_process_layers, model.num_decoder_layers
    passes = rows * (4 if model.remat == "layers" else 3)
    counts = {"num_process_layers": layers, "num_decoder_layers": decoder_layers}
    width = model.embed_dim
    if model.language_model is not None:
        del counts["num_decoder_layers"]
        decoder_layers, width = model.language_model.num_layers, model.language_model.embed_dim
    if model.image.encoder == "vit":
        counts["image.num_layers"] = model.image.num_layers
    token = rows * model.embed_dim * jnp.dtype(model.dtype).itemsize
    encoded = token * num_memory(dataclasses.replace(model, num_memory_tokens=0), **sizes)
    decoded = token // model.embed_dim * width * prompts * (length - 1) * decoder_layers
    return Subject(
        config=model,
        make=SlamV3,
        loss=functools.partial(slam_v3_loss, config=experiment.loss),
        weight_of=num_answer_tokens,
        batch=batch,
        optimizer=experiment.optimizer,
        mesh=experiment.mesh,
        require_even=experiment.check,
        depths={name: Depth(0, 1, count) for name, count in counts.items()},
        flops=Flops(passes * forward(layers), passes * layers * (forward(2) - forward(1))),
        stream_bytes=(encoded, encoded * (2 + model.num_processes * layers) + decoded),
        num_processes=model.num_processes,
        view=view,
        provided=provided_by(bases_of(experiment.model, hashed=False)),
    )


@dataclasses.dataclass(frozen=True)
class LanguageRun:
    """Training of a language model on rows of `num_tokens` tokens; it can only be planned.

    language_model, preset: of `slam_jax.language_models.make_config`. model: fields of the model's
    configuration to change. batch_size: rows a step.
    """

    language_model: str
    preset: str
    batch_size: int
    num_tokens: int
    model: Mapping[str, Any] | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()

    def subject(self) -> Subject:
        config = _for_accelerators(
            make_config(self.language_model, self.preset, **(self.model or {}))
        )
        require_count("batch_size", self.batch_size)
        require_count("num_tokens", self.num_tokens, most=config.context_length)
        rows, parts = self.batch_size, self.optimizer.accumulate_steps
        require_even = functools.partial(require_even_batch, "batch_size", rows, parts)
        require_even(None)
        flops = training_flops(config, self.num_tokens)
        if config.remat == "layers":
            flops += config.body_flops(self.num_tokens)
        stream = rows * self.num_tokens * config.embed_dim * jnp.dtype(config.dtype).itemsize
        return Subject(
            config=config,
            make=make_model,
            loss=language_model_loss,
            weight_of=lambda part: 1.0,
            batch=jax.ShapeDtypeStruct((rows, self.num_tokens + 1), jnp.int32),
            optimizer=self.optimizer,
            mesh=self.mesh,
            require_even=require_even,
            depths=_depths(self.language_model, config),
            flops=Flops(rows * flops),
            stream_bytes=(stream, stream * getattr(config, "num_layers", 1)),
        )


def language_run(task: LanguageTask) -> Subject:
    """A run of `train` of a language model. A tokenizer that is yet to be trained counts as large
    as `data.vocab_size` allows; no text is read."""
    experiment = task.experiment
    data, optimizer = experiment.data, experiment.optimizer
    known = experiment.language_model.config.vocab_size
    config = _for_accelerators(experiment.with_vocabulary(data.vocab_size if known == 1 else known))
    packed = not isinstance(config, SlamV3TextConfig) and data.pack is not False
    shape = data.batch_size, data.length + 1
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    counted: Any = jax.ShapeDtypeStruct(shape, jnp.bool_)
    flops = training_flops(config, data.length)
    if config.remat == "layers":
        flops += config.body_flops(data.length)
    width = config.embed_dim * jnp.dtype(config.dtype).itemsize
    stream = data.batch_size * data.length * width
    return Subject(
        config=config,
        make=lambda config, rngs: make_adapted(config, experiment.lora, rngs=rngs),
        loss=task.loss,
        weight_of=task.weight_of,
        batch=TextBatch(ids, ids, counted, packed),
        optimizer=optimizer,
        mesh=experiment.mesh,
        require_even=experiment.check,
        depths={} if experiment.lora.rank else _depths(experiment.language_model.name, config),
        flops=Flops(data.batch_size * flops),
        stream_bytes=(stream, stream * getattr(config, "num_layers", 1)),
        provided=provided_by(task.bases(hashed=False)),
    )


def _depths(system: str | None, config: Any) -> dict[str, Depth]:
    """Empty where the layers follow no period."""
    if system not in ("standard", "moe", "deepseek_v2", "jamba"):
        return {}
    first = config.num_dense_layers if system == "deepseek_v2" else 0
    is_jamba = system == "jamba"
    period = math.lcm(config.attention_period, config.expert_period) if is_jamba else 1
    repeats, rest = divmod(config.num_layers - first, period)
    return {} if rest else {"num_layers": Depth(first, period, repeats)}


def _for_accelerators(config: Any) -> Any:
    """The configuration of a model as it is on GPUs and TPUs, for which plans are made."""
    with for_accelerators():
        return dataclasses.replace(config, dtype=config.dtypes["dtype"].name)


def subject_of(config: ConfigDict | Mapping[str, Any]) -> Subject:
    """A `LanguageRun` for a configuration with the field `language_model`, a `language_run` for one
    with the group of that name, else a `slam_v3_run`.

    The data set of a run is built if necessary, since shapes of batches depend on it. Of the views
    that the run trains on the largest is planned: one that the alignment loss encodes twice comes
    first, then the one with the most encoder tokens.
    """
    values = as_json(config)
    if is_language(values):
        task = LanguageTask(LanguageExperiment.from_config(values))
        return language_run(task.opened(None, {}))
    if "language_model" in values:
        return build(LanguageRun, values).subject()
    experiment, runs = Experiment.from_config(values), []
    experiment = dataclasses.replace(experiment, model=with_pretrained(experiment.model))
    dataset = prepare(experiment.data, model=experiment.model)
    for view in experiment.data.views:
        stages = ((0, {view: 1.0}),)
        # The longest batches count.
        data = dataclasses.replace(experiment.data, stages=stages, bucket_lengths=False, workers=0)
        _, row = next(training_batches(dataset.train, dataset.tokenizer, data, rows=range(1)))
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((experiment.data.batch_size, *x.shape[1:]), x.dtype), row
        )
        runs.append(slam_v3_run(experiment, dataset.tokenizer.vocab_size, batch, view))
    return max(runs, key=lambda run: (is_aligned(experiment.loss, run.batch), run.stream_bytes[0]))
