"""What can be planned: a run of SLAM v3, or the training of a language model."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from slam_jax.data import Batch
from slam_jax.errors import require, require_count
from slam_jax.language_models.flops import training_flops
from slam_jax.language_models.registry import make_config, make_model
from slam_jax.slam_v3.flops import decode_flops, encode_flops, num_memory
from slam_jax.training.experiment import Experiment
from slam_jax.training.losses import language_model_loss
from slam_jax.training.mesh import MeshConfig
from slam_jax.training.optimizer import OptimizerConfig, make_optimizer
from slam_jax.training.start import jit_step, loss_of, require_even, state_shapes
from slam_jax.training.state import TrainState, init_state, make_train_step, split_model


class Depth(NamedTuple):
    """Layers of one kind: `first` others, then `repeats` times `period` that are alike."""

    first: int
    period: int
    repeats: int

    def layers(self, repeats: int) -> int:
        return self.first + self.period * repeats


class Flops(NamedTuple):
    """Of a step on a whole batch. process: those of the total that the axis `process` divides."""

    total: int
    process: int

    def of_device(self, sizes: Mapping[str, int], num_heads: int) -> float:
        """`data` and `fsdp` divide the batch, `process` the processes, and `tensor` every product,
        if it divides the heads; what an axis does not divide, its devices all do."""
        tensor = sizes.get("tensor", 1)
        parts = sizes.get("data", 1) * sizes.get("fsdp", 1)
        parts *= 1 if num_heads % tensor else tensor
        processes = self.process / sizes.get("process", 1)
        return (self.total - self.process + processes) / parts


@dataclasses.dataclass(frozen=True)
class SlamV3Run:
    """A run of `train`. batch: shapes of a whole one. view: that it shows."""

    experiment: Experiment
    vocab_size: int
    batch: Batch
    view: str | None = None

    @property
    def mesh(self) -> MeshConfig:
        return self.experiment.mesh

    @property
    def num_heads(self) -> int:
        return self.experiment.model.num_heads

    @property
    def num_processes(self) -> int:
        return self.experiment.model.num_processes

    @property
    def depths(self) -> Mapping[str, Depth]:
        """Field of the model -> its layers."""
        model, image = self.experiment.model, self.experiment.model.image
        counts = {name: getattr(model, name) for name in _LAYERS}
        if image.encoder == "vit":
            counts["image.num_layers"] = image.num_layers
        return {name: Depth(0, 1, count) for name, count in counts.items()}

    @property
    def aligned(self) -> bool:
        """Whether text and image are encoded once more, each alone."""
        return self.experiment.loss.alignment > 0 and self.batch.paired

    @property
    def stream_bytes(self) -> tuple[int, int]:
        """What the tokens between layers take, of the whole batch: of the encoder once, and of all
        layers together."""
        model = self.experiment.model
        rows, prompts, length = self.batch.tokens.shape
        width = rows * model.embed_dim * jnp.dtype(model.dtype).itemsize
        encoded = width * num_memory(dataclasses.replace(model, num_memory_tokens=0), **self._sizes)
        decoded = width * prompts * (length - 1) * model.num_decoder_layers
        return encoded, encoded * (2 + model.num_processes * model.num_process_layers) + decoded

    @property
    def flops(self) -> Flops:
        """Three forward passes; with remat "layers" four. What "maps" takes anew, attention and
        what is no product, is not counted."""
        model, sizes = self.experiment.with_vocabulary(self.vocab_size), self._sizes
        encodes = [sizes]
        if self.aligned:
            encodes += [{name: sizes[name]} for name in ("text", "pixels")]
        rows, prompts, length = self.batch.tokens.shape
        memory = num_memory(model, **sizes)
        total = decode_flops(model, prompts=prompts, length=length - 1, memory=memory)
        total += sum(encode_flops(model, **given) for given in encodes)
        one, two = (dataclasses.replace(model, num_process_layers=n) for n in (1, 2))
        layer = sum(encode_flops(two, **given) - encode_flops(one, **given) for given in encodes)
        processes = model.num_process_layers * layer
        passes = 4 if model.remat == "layers" else 3
        return Flops(passes * rows * total, passes * rows * processes)

    @property
    def part(self) -> Batch:
        """What of the batch is taken at once."""
        return _first_part(self.batch, self.experiment.optimizer.accumulate_steps)

    @property
    def loss(self) -> Callable[..., Any]:
        return loss_of(self.experiment)

    def with_layers(self, layers: Mapping[str, int]) -> "SlamV3Run":
        own = {name: count for name, count in layers.items() if name in _LAYERS}
        model = self.experiment.model
        image = dataclasses.replace(
            model.image, num_layers=layers.get("image.num_layers", model.image.num_layers)
        )
        model = dataclasses.replace(model, image=image, **own)
        return dataclasses.replace(
            self, experiment=dataclasses.replace(self.experiment, model=model)
        )

    def state(self) -> tuple[nnx.GraphDef, TrainState]:
        return state_shapes(self.experiment, self.vocab_size)

    def step(self, graphdef: nnx.GraphDef, state: TrainState) -> Any:
        return jit_step(self.experiment, graphdef, state)

    def require_even(self, mesh: Mesh | None) -> None:
        require_even(self.experiment, mesh)

    @property
    def _sizes(self) -> dict[str, Any]:
        inputs, sizes = self.batch.inputs, {}
        if inputs.text is not None:
            sizes["text"] = inputs.text.shape[1]
        if inputs.image is not None:
            sizes["pixels"] = inputs.image.shape[1:3]
        if inputs.aux is not None:
            sizes["aux"] = inputs.aux.shape[1]
        return sizes


_LAYERS = ("num_process_layers", "num_decoder_layers")


@dataclasses.dataclass(frozen=True)
class LanguageRun:
    """The training of a language model, which has no data set here.

    language_model, preset: of `slam_jax.language_models.make_config`. model: fields of its
    configuration that are changed. batch_size: rows a step. num_tokens: of a row.
    """

    language_model: str
    preset: str
    batch_size: int
    num_tokens: int
    model: Mapping[str, Any] | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        require_count("batch_size", self.batch_size)
        most = self.config.context_length
        require_count("num_tokens", self.num_tokens, most=most)
        parts = self.optimizer.accumulate_steps
        even = f"a divisor of batch_size={self.batch_size}"
        require(self.batch_size % parts == 0, "optimizer.accumulate_steps", parts, even)

    @property
    def view(self) -> None:
        """All batches are alike."""

    @property
    def config(self) -> Any:
        return make_config(self.language_model, self.preset, **(self.model or {}))

    @property
    def batch(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch_size, self.num_tokens + 1), jnp.int32)

    @property
    def num_heads(self) -> int:
        return self.config.num_heads

    @property
    def num_processes(self) -> int:
        """The axis `process` divides what is stacked, of few models; no plan counts on it."""
        return 1

    @property
    def depths(self) -> Mapping[str, Depth]:
        """Empty for the models whose layers are not all alike: those are compiled whole."""
        config, first, period = self.config, 0, 1
        if self.language_model == "deepseek_v2":
            first = config.num_dense_layers
        elif self.language_model == "jamba":
            period = math.lcm(config.attention_period, config.expert_period)
        elif self.language_model not in ("standard", "moe"):
            return {}
        repeats, rest = divmod(config.num_layers - first, period)
        return {} if rest else {"num_layers": Depth(first, period, repeats)}

    @property
    def stream_bytes(self) -> tuple[int, int]:
        config = self.config
        once = self.batch_size * self.num_tokens * config.embed_dim
        once *= jnp.dtype(config.dtype).itemsize
        return once, once * getattr(config, "num_layers", 1)

    @property
    def flops(self) -> Flops:
        """Three forward passes; with remat "layers" a fourth of all but the head."""
        a_row = training_flops(self.config, self.num_tokens)
        if self.config.remat == "layers":
            a_row += self.config.body_flops(self.num_tokens)
        return Flops(self.batch_size * a_row, 0)

    @property
    def part(self) -> jax.ShapeDtypeStruct:
        """What of the batch is taken at once."""
        return _first_part(self.batch, self.optimizer.accumulate_steps)

    @property
    def loss(self) -> Callable[..., Any]:
        return language_model_loss

    def with_layers(self, layers: Mapping[str, int]) -> "LanguageRun":
        return dataclasses.replace(self, model={**(self.model or {}), **layers})

    def state(self) -> tuple[nnx.GraphDef, TrainState]:
        def make() -> nnx.Module:
            return make_model(self.config, rngs=nnx.Rngs(0))

        def first_state() -> TrainState:
            params, key = split_model(make())[1], jax.random.key(0)
            ema = self.optimizer.ema_decay is not None
            return init_state(params, make_optimizer(self.optimizer, _STEPS), key, ema=ema)

        return split_model(nnx.eval_shape(make))[0], jax.eval_shape(first_state)

    def step(self, graphdef: nnx.GraphDef, state: TrainState) -> Any:
        options = self.optimizer
        step_fn = make_train_step(
            graphdef,
            self.loss,
            make_optimizer(options, _STEPS),
            ema_decay=options.ema_decay,
            accumulate_steps=options.accumulate_steps,
        )
        shardings = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))

    def require_even(self, mesh: Mesh | None) -> None:
        if mesh is None:
            return
        parts = self.optimizer.accumulate_steps * mesh.shape["data"] * mesh.shape["fsdp"]
        even = f"a multiple of {parts}, optimizer.accumulate_steps times mesh.data times mesh.fsdp"
        require(self.batch_size % parts == 0, "batch_size", self.batch_size, even)


def _first_part(batch: Any, parts: int) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype), batch
    )


_STEPS = 1_000  # of the schedule, whose shapes do not depend on it

Subject = SlamV3Run | LanguageRun
