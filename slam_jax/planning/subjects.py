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
from slam_jax.errors import require_count
from slam_jax.language_models.flops import training_flops
from slam_jax.language_models.registry import make_config, make_model
from slam_jax.slam_v3.flops import decode_flops, encode_flops, num_memory
from slam_jax.training.experiment import Experiment, require_even_batch
from slam_jax.training.losses import language_model_loss
from slam_jax.training.mesh import MeshConfig
from slam_jax.training.optimizer import OptimizerConfig, make_optimizer
from slam_jax.training.start import jit_step, loss_of, state_shapes
from slam_jax.training.state import TrainState, init_state, make_train_step, split_model

_NUM_STEPS = 1_000  # of a language model's schedule; no figure depends on it


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
    process: int

    def of_device(self, sizes: Mapping[str, int], num_heads: int) -> float:
        """The part of one device; devices along an axis that divides nothing repeat the work.

        `data` and `fsdp` divide the batch, `process` the processes, and `tensor` all products if
        it divides the heads.
        """
        tensor = sizes.get("tensor", 1)
        parts = sizes.get("data", 1) * sizes.get("fsdp", 1)
        parts *= 1 if num_heads % tensor else tensor
        processes = self.process / sizes.get("process", 1)
        return (self.total - self.process + processes) / parts


@dataclasses.dataclass(frozen=True)
class SlamV3Run:
    """A run of `train` on batches of one view. batch: shapes of a whole batch."""

    experiment: Experiment
    vocab_size: int
    batch: Batch
    view: str | None = None

    @property
    def mesh(self) -> MeshConfig:
        return self.experiment.mesh

    @property
    def optimizer(self) -> OptimizerConfig:
        return self.experiment.optimizer

    @property
    def num_heads(self) -> int:
        return self.experiment.model.num_heads

    @property
    def num_processes(self) -> int:
        return self.experiment.model.num_processes

    @property
    def depths(self) -> Mapping[str, Depth]:
        """Name of a field of the model's configuration -> its layers."""
        model = self.experiment.model
        counts = {name: getattr(model, name) for name in _LAYERS}
        if model.image.encoder == "vit":
            counts["image.num_layers"] = model.image.num_layers
        return {name: Depth(0, 1, count) for name, count in counts.items()}

    @property
    def is_aligned(self) -> bool:
        """Whether text and image are also encoded alone, for the alignment loss."""
        return self.experiment.loss.alignment > 0 and self.batch.paired

    @property
    def stream_bytes(self) -> tuple[int, int]:
        """Bytes of the whole batch's activations between layers: encoder tokens, all layers."""
        model = self.experiment.model
        rows, prompts, length = self.batch.tokens.shape
        token = rows * model.embed_dim * jnp.dtype(model.dtype).itemsize
        unpooled = dataclasses.replace(model, num_memory_tokens=0)
        encoded = token * num_memory(unpooled, **self._sizes)
        decoded = token * prompts * (length - 1) * model.num_decoder_layers
        return encoded, encoded * (2 + model.num_processes * model.num_process_layers) + decoded

    @property
    def flops(self) -> Flops:
        """Three forward passes, four with remat "layers"; recomputing "maps" is not counted."""
        model, sizes = self.experiment.with_vocabulary(self.vocab_size), self._sizes
        encodes = [sizes]
        if self.is_aligned:
            encodes += [{name: sizes[name]} for name in ("text", "pixels")]

        def encode(num_process_layers: int) -> int:
            config = dataclasses.replace(model, num_process_layers=num_process_layers)
            return sum(encode_flops(config, **inputs) for inputs in encodes)

        rows, prompts, length = self.batch.tokens.shape
        memory, layers = num_memory(model, **sizes), model.num_process_layers
        decode = decode_flops(model, prompts=prompts, length=length - 1, memory=memory)
        passes = rows * (4 if model.remat == "layers" else 3)
        return Flops(passes * (decode + encode(layers)), passes * layers * (encode(2) - encode(1)))

    @property
    def loss(self) -> Callable[..., Any]:
        return loss_of(self.experiment)

    def with_layers(self, layers: Mapping[str, int]) -> "SlamV3Run":
        own, model = (
            {name: n for name, n in layers.items() if name in _LAYERS},
            self.experiment.model,
        )
        depth = layers.get("image.num_layers", model.image.num_layers)
        image = dataclasses.replace(model.image, num_layers=depth)
        model = dataclasses.replace(model, image=image, **own)
        experiment = dataclasses.replace(self.experiment, model=model)
        return dataclasses.replace(self, experiment=experiment)

    def state(self) -> tuple[nnx.GraphDef, TrainState]:
        return state_shapes(self.experiment, self.vocab_size)

    def step(self, graphdef: nnx.GraphDef, state: TrainState) -> Any:
        return jit_step(self.experiment, graphdef, state)

    def require_even(self, mesh: Mesh | None) -> None:
        self.experiment.check(mesh)

    @property
    def _sizes(self) -> dict[str, Any]:
        inputs = self.batch.inputs
        sizes = {
            "text": None if inputs.text is None else inputs.text.shape[1],
            "pixels": None if inputs.image is None else inputs.image.shape[1:3],
            "aux": None if inputs.aux is None else inputs.aux.shape[1],
        }
        return {name: size for name, size in sizes.items() if size is not None}


_LAYERS = ("num_process_layers", "num_decoder_layers")


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

    loss = staticmethod(language_model_loss)
    view = None  # all batches are alike
    num_processes = 1  # the axis `process` divides no work that a plan counts on

    def __post_init__(self):
        require_count("batch_size", self.batch_size)
        require_count("num_tokens", self.num_tokens, most=self.config.context_length)
        self.require_even(None)

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
    def depths(self) -> Mapping[str, Depth]:
        """Empty for models whose layers follow no period: they are compiled whole."""
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
        tokens = self.batch_size * self.num_tokens
        once = tokens * config.embed_dim * jnp.dtype(config.dtype).itemsize
        return once, once * getattr(config, "num_layers", 1)

    @property
    def flops(self) -> Flops:
        """Three forward passes; with remat "layers" a fourth of all but the head."""
        row = training_flops(self.config, self.num_tokens)
        if self.config.remat == "layers":
            row += self.config.body_flops(self.num_tokens)
        return Flops(self.batch_size * row, 0)

    def with_layers(self, layers: Mapping[str, int]) -> "LanguageRun":
        return dataclasses.replace(self, model={**(self.model or {}), **layers})

    def state(self) -> tuple[nnx.GraphDef, TrainState]:
        def make() -> nnx.Module:
            return make_model(self.config, rngs=nnx.Rngs(0))

        def first_state() -> TrainState:
            optimizer = make_optimizer(self.optimizer, _NUM_STEPS)
            ema = self.optimizer.ema_decay is not None
            return init_state(split_model(make())[1], optimizer, jax.random.key(0), ema=ema)

        return split_model(nnx.eval_shape(make))[0], jax.eval_shape(first_state)

    def step(self, graphdef: nnx.GraphDef, state: TrainState) -> Any:
        step = make_train_step(
            graphdef,
            self.loss,
            make_optimizer(self.optimizer, _NUM_STEPS),
            ema_decay=self.optimizer.ema_decay,
            accumulate_steps=self.optimizer.accumulate_steps,
        )
        shardings = jax.tree.map(lambda x: x.sharding, state)
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

    def require_even(self, mesh: Mesh | None) -> None:
        parts = self.optimizer.accumulate_steps
        require_even_batch("batch_size", self.batch_size, parts, mesh)


Subject = SlamV3Run | LanguageRun
