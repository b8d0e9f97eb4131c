"""The configuration of a run of a language model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from slam_jax.data.texts import TextDataConfig
from slam_jax.errors import check_names, require, require_count
from slam_jax.language_models.registry import SYSTEMS, make_config
from slam_jax.layers.lora import LoraConfig
from slam_jax.model_config import from_fields
from slam_jax.training.experiment import RunConfig, as_json, build, require_even_batch
from slam_jax.training.mesh import MeshConfig
from slam_jax.training.optimizer import OptimizerConfig

DEFAULT = "standard"
SCORES = ("loss", "perplexity", "bits_per_byte", "accuracy", "exact_match", "token_accuracy")
"""What an evaluation of texts has; the last two only of rows with answers."""
_SIZES = (
    *("embed_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("num_experts", "num_experts_per_token", "expert_dim", "context_length", "tie_embeddings"),
)
_RUNTIME = ("dtype", "param_dtype", "remat", "scan_layers", "matmul_precision")


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """A language model of the registry (`slam_jax.language_models.SYSTEMS`).

    name: of the system; None = "standard", or that of `run.init_from`, which also has the sizes.
    preset: of its sizes. embed_dim .. tie_embeddings: sizes of the preset to change, None = as
      there. others: the same for further fields of its configuration, by name.
    dtype .. matmul_precision: see `LanguageModelConfig`; dtype=None is that of the device.
    config: all fields; found when a run starts, and stored with its checkpoints.

    Raises ConfigError for a system, a preset or a field that is not there.
    """

    name: str | None = None
    preset: str = "small"
    embed_dim: int | None = None
    mlp_dim: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    num_experts: int | None = None
    num_experts_per_token: int | None = None
    expert_dim: int | None = None
    context_length: int | None = None
    tie_embeddings: bool | None = None
    others: Mapping[str, Any] | None = None
    dtype: str | None = None
    param_dtype: str = "float32"
    remat: str | None = None
    scan_layers: bool | None = None
    matmul_precision: str | None = "float32"
    config: Any = None

    def __post_init__(self) -> None:
        if self.name is not None:
            check_names([self.name], list(SYSTEMS), "language_model.name: the registry", "model")
        if isinstance(self.config, Mapping):
            kind = SYSTEMS[self.name or DEFAULT].config
            object.__setattr__(self, "config", from_fields(kind, self.config))

    @property
    def changes(self) -> dict[str, Any]:
        """The sizes that are not those of the preset."""
        given = {field: getattr(self, field) for field in _SIZES}
        return {**{k: v for k, v in given.items() if v is not None}, **(self.others or {})}

    def with_config(self, name: str, config: Any = None) -> "ModelChoice":
        """The same with a system and all fields of its configuration; None = those of the preset.
        The vocabulary is 1 until the tokenizer is known."""
        if config is None:
            config = make_config(name, self.preset, **{**self.changes, "vocab_size": 1})
        runtime = {field: getattr(self, field) for field in _RUNTIME}
        config = dataclasses.replace(config, **runtime)
        return dataclasses.replace(self, name=name, config=config)


@dataclasses.dataclass(frozen=True)
class TextLossConfig:
    """chunk_tokens: see `LossConfig`."""

    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None:
            require_count("loss.chunk_tokens", self.chunk_tokens)


@dataclasses.dataclass(frozen=True)
class LanguageExperiment:
    """The configuration of a whole run of a language model.

    seed: of the initial parameters. lora: adapters, which then train alone unless `optimizer.train`
    says otherwise. run.init_from: a folder of the hub, a GGUF file, or the workdir of another such
    run, whose model, weights and tokenizer the run begins with.
    """

    seed: int
    language_model: ModelChoice
    data: TextDataConfig
    optimizer: OptimizerConfig
    run: RunConfig
    loss: TextLossConfig = TextLossConfig()
    lora: LoraConfig = dataclasses.field(default=LoraConfig())
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        require_count("seed", self.seed, least=0, most=2**32 - 1)
        views = self.run.evaluate_views
        require(not views, "run.evaluate_views", views, "(), as texts have no views")
        known, chosen = ", ".join(SCORES), self.run.best_metric
        require(chosen in SCORES, "run.best_metric", chosen, f"one of {known}")
        self.check()

    def check(self, mesh: Mesh | None = None) -> None:
        """Raises ConfigError where fields of different groups do not fit together."""
        parts, size = self.optimizer.accumulate_steps, self.data.batch_size
        require_even_batch("data.batch_size", size, parts, mesh)
        if self.language_model.config is not None:
            most = self.language_model.config.context_length
            expected = f"at most {most:,}, the context of the model"
            require(self.data.length <= most, "data.length", self.data.length, expected)

    @classmethod
    def from_config(cls, config: ConfigDict | Mapping[str, Any]) -> "LanguageExperiment":
        """From nested mappings. Raises ConfigError, naming a field that is wrong."""
        return build(cls, as_json(config), "")

    def with_vocabulary(self, vocab_size: int) -> Any:
        """The model's configuration for a tokenizer of so many tokens; published models may have
        more rows."""
        config = self.language_model.config
        return dataclasses.replace(config, vocab_size=max(vocab_size, config.vocab_size))


def default_language_config() -> ConfigDict:
    """All fields of a configuration; a file in configs/ starts from it and changes some."""
    run = RunConfig(best_metric="loss")
    groups = LanguageExperiment(0, ModelChoice(), TextDataConfig(), OptimizerConfig(), run)
    return ConfigDict(as_json(dataclasses.asdict(groups)))
