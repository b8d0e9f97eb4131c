"""Runs of language models: their model, their batches and their scores."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from slam_jax.data.hub_tokenizer import AnyTokenizer, load_tokenizer, tokenizer_from_json
from slam_jax.data.order import Order
from slam_jax.data.packing import TextBatch, scoring_batches, text_batches
from slam_jax.data.text_dataset import TextDataset, open_texts
from slam_jax.data.texts import SPLITS
from slam_jax.errors import ConfigError, UserError, require
from slam_jax.evaluation.language import score_texts, summarise_texts
from slam_jax.interop.pretrained import is_published, open_pretrained
from slam_jax.language_models.flops import training_flops
from slam_jax.language_models.registry import SYSTEMS, make_config, make_model
from slam_jax.language_models.slam_v3_text import SlamV3TextConfig
from slam_jax.layers.lora import LoraConfig, add_lora
from slam_jax.runtime.signals import Stopped
from slam_jax.training.base import BaseRecord, Bases
from slam_jax.training.checkpoint import Checkpoints
from slam_jax.training.experiment import as_json, is_language
from slam_jax.training.language_experiment import DEFAULT, LanguageExperiment, ModelChoice
from slam_jax.training.losses import LanguageLossParts, language_model_loss
from slam_jax.training.pretrained import base_of, path_of
from slam_jax.training.state import TrainState
from slam_jax.training.task import Beside

SOURCE = "run.init_from"
_ADAPTERS = ("*lora_*",)


@dataclasses.dataclass(frozen=True)
class LanguageTask:
    """The training of a language model; see `slam_jax.training.task.Task`."""

    experiment: LanguageExperiment

    num_processes = 1

    @property
    def init_from(self) -> str | None:
        """Published weights are a base, of which what is frozen is not stored."""
        source = self.experiment.run.init_from
        return None if source is None or is_published(source) else source

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        own = self.experiment.language_model
        fields = dict(dtype=own.dtype, matmul_precision=own.matmul_precision)
        return make_config(DEFAULT, "tiny", **fields).precision()

    def check(self, mesh: Mesh | None, dataset: TextDataset | None = None) -> None:
        self.experiment.check(mesh)

    def opened(
        self, old: "LanguageTask | None", records: Mapping[str, BaseRecord]
    ) -> "LanguageTask":
        """The sizes of the model are those of `run.init_from`, or of the preset; those of a
        resumed run, of its checkpoint. With a source all parameters train, with adapters these."""
        own, run, optimizer = (
            getattr(self.experiment, name) for name in ("language_model", "run", "optimizer")
        )
        if old is not None:
            known = old.experiment.language_model
            name = own.name or (known.name if old.experiment.run.init_from else DEFAULT)
            model = own.with_config(name, known.config)
            source = old.experiment.run.init_from
        else:
            source = run.init_from
            model = own.with_config(own.name or DEFAULT) if source is None else _of(source, own)
        if not optimizer.train:
            train = _ADAPTERS if self.experiment.lora.rank else ("*",) if source else ()
            optimizer = dataclasses.replace(optimizer, train=train)
        if records:
            run = dataclasses.replace(run, init_from=str(path_of(records[SOURCE])))
        changed = dict(language_model=model, optimizer=optimizer, run=run)
        return LanguageTask(dataclasses.replace(self.experiment, **changed))

    def stored(self, config: dict[str, Any]) -> dict[str, Any]:
        groups = {n: getattr(self.experiment, n) for n in ("language_model", "optimizer")}
        return as_json({**config, **{n: dataclasses.asdict(x) for n, x in groups.items()}})

    def bases(
        self, records: Mapping[str, BaseRecord] | None = None, *, hashed: bool = True
    ) -> Bases:
        """hashed: False = without the sha256 of the files, for shapes alone."""
        source = self.experiment.run.init_from
        if records is not None:
            if SOURCE not in records:
                return ()
            source = str(path_of(records[SOURCE]))
        if source is None or not is_published(source):
            return ()
        record = None if records is None else records[SOURCE]
        config = self.experiment.language_model.config
        parts = SOURCE, source, (), config, open_pretrained(source), make_model, record
        return (base_of(*parts, hashed=hashed),)

    def open_dataset(
        self,
        checkpoints: Checkpoints,
        latest: int | None,
        changed: bool = False,
        given: TextDataset | None = None,
    ) -> TextDataset:
        if given is not None:
            return given
        if latest is None:
            return self.texts(self._tokenizer())
        return self.texts(tokenizer_from_json(checkpoints.read_tokenizer(latest)))

    def introduce(self, dataset: TextDataset) -> list[str]:
        kind = "prompts with answers" if dataset.has_answers else "texts"
        rows = ", ".join(f"{len(dataset.splits[name]):,} {name}" for name in SPLITS)
        return [
            f"{kind} of {dataset.place}; rows of {self.experiment.data.length:,} tokens: {rows}"
        ]

    def texts(self, tokenizer: AnyTokenizer | None) -> TextDataset:
        """The texts of the configuration; see `open_texts`."""
        config = self.experiment.language_model.config
        can_pack = not isinstance(config, SlamV3TextConfig)
        return open_texts(self.experiment.data, tokenizer, can_pack=can_pack)

    def _tokenizer(self) -> AnyTokenizer | None:
        """That of the configuration, or of the source; None = one is to be trained."""
        given, source = self.experiment.data.tokenizer, self.experiment.run.init_from
        if given is not None:
            return load_tokenizer(given)
        if source is None:
            return None
        if is_published(source):
            return load_tokenizer(source)
        return tokenizer_from_json(Checkpoints(source).read_tokenizer(None))

    def beside(self, dataset: TextDataset) -> Beside:
        longest = dataset.longest_answer
        return Beside(
            tokenizer=dataset.tokenizer.to_json(),
            generation={"max_new_tokens": longest} if dataset.has_answers else None,
            data=dataset.identity,
        )

    def model(self, vocab_size: int) -> Callable[..., nnx.Module]:
        return functools.partial(
            make_adapted, self.experiment.with_vocabulary(vocab_size), self.experiment.lora
        )

    def loss(self, model: Any, batch: TextBatch, *, key: Any = None) -> LanguageLossParts:
        more: dict[str, Any] = dict(counted=batch.counted, key=key)
        more["chunk_tokens"] = self.experiment.loss.chunk_tokens
        if batch.packed:
            return language_model_loss(model, batch.tokens, segment_ids=batch.segments, **more)
        return language_model_loss(model, batch.tokens, batch.segments > 0, **more)

    def weight_of(self, batch: TextBatch) -> Any:
        return batch.counted[..., 1:].sum()

    def batches(
        self, dataset: TextDataset, start_step: int, rows: Sequence[int], order: Order
    ) -> Iterator[tuple[str, TextBatch]]:
        data = self.experiment.data
        parts = dataset.splits["train"], data.batch_size, data.seed
        return text_batches(*parts, start_step=start_step, rows=rows, order=order)

    def num_tokens(self, batch: TextBatch) -> int:
        share = self.experiment.data.batch_size / len(batch.tokens)
        return round(np.sum(batch.segments > 0) * share)

    def flops(self, vocab_size: int, batch: TextBatch) -> int:
        """By the convention of `training_flops`, pads included."""
        config, length = self.experiment.with_vocabulary(vocab_size), batch.tokens.shape[1] - 1
        return self.experiment.data.batch_size * training_flops(config, length)

    def validate(
        self,
        graphdef: nnx.GraphDef,
        state: TrainState,
        dataset: TextDataset,
        should_stop: Callable[[], bool],
    ) -> dict[str, float]:
        """`summarise_texts` of the validation split, or of `run.evaluate_batches` of it."""
        run, parts = self.experiment.run, self.experiment.optimizer.accumulate_steps
        size = self.experiment.data.batch_size // parts
        count = run.evaluate_batches and run.evaluate_batches * parts

        def batches() -> Iterator[Any]:
            every = scoring_batches(dataset.splits["validation"], size, shuffled=count is not None)
            for each in itertools.islice(every, count):
                if should_stop():
                    raise Stopped
                yield each

        params = nnx.State(state.best_params)
        scores = score_texts(graphdef, params, batches(), dataset.tokenizer.token_bytes)
        return summarise_texts(scores, answers=dataset.has_answers)

    def describe(self, scores: Mapping[str, float]) -> str:
        found = f"validation loss {scores['loss']:.3f} · {scores['bits_per_byte']:.3f} bits/byte"
        found += f" · perplexity {scores['perplexity']:.4g}"
        if "exact_match" in scores:
            found += f" · {100 * scores['exact_match']:.1f} % exact"
        return found


def make_adapted(config: Any, lora: LoraConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """The model of a configuration, with its adapters, which start last."""
    model = make_model(config, rngs=rngs)
    if lora.rank:
        add_lora(model, lora.rank, lora.alpha, lora.patterns, rngs)
    return model


def _of(source: str, own: ModelChoice) -> ModelChoice:
    """The model that a source has. Raises ConfigError where it has none, or is not as asked for."""
    try:
        if is_published(source):
            config = open_pretrained(source).config
        else:
            saved = Checkpoints(source).read_config(None)
            require(is_language(saved), SOURCE, source, "a language model, or the run of one")
            config = LanguageExperiment.from_config(saved).language_model.config
    except UserError as error:
        raise ConfigError(f"{SOURCE} is {source!r}: {error}") from error
    for field, value in own.changes.items():
        require(False, f"language_model.{field}", value, f"None, as {SOURCE} says it")
    name = next(name for name, system in SYSTEMS.items() if system.config is type(config))
    expected = f"{name!r} or None, as {SOURCE} has it"
    require(own.name in (None, name), "language_model.name", own.name, expected)
    return own.with_config(name, config)
