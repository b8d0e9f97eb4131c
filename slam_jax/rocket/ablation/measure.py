"""SLAM v3 with parts of it changed; each variant is trained and tested as any run is.

Every run has a workdir of its own, as `train.py` leaves it, so that a stopped run resumes.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from slam_jax.data import evaluation_batches, prepare
from slam_jax.data.views import with_halves
from slam_jax.errors import require
from slam_jax.evaluation import evaluate
from slam_jax.evaluation.answers import Answer
from slam_jax.rocket.machine import peak_memory
from slam_jax.rocket.tasks import Json, Report, check_settings
from slam_jax.slam_v3.config import SlamV3Config
from slam_jax.slam_v3.flops import decode_flops, encode_flops, num_memory
from slam_jax.training import Experiment, load, override, split_model, train
from slam_jax.training.flops import input_sizes


@dataclasses.dataclass(frozen=True)
class AblationSettings:
    """What is compared.

    base: a whole configuration, as `train.py` takes it. variants: by name, the fields that differ
      from it, with dots ("model.num_processes"); the others are compared with the first variant.
    seeds: of each variant's runs: of parameters, order of examples and dropout.
    """

    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)

    def __post_init__(self):
        seeds = ("seeds", "tuning_seeds")
        check_settings(self, zero=(*seeds, "more_learning_rates"), large=seeds)
        for name, changes in self.variants.items():
            mapping = isinstance(changes, Mapping)
            require(mapping, f"variants.{name}", changes, "fields and their values")

    def config_of(self, variant: str, seed: int) -> Json:
        """The whole configuration of a run."""
        changes = {"seed": seed, "data.seed": seed, **self.variants[variant]}
        return override(self.base, [f"--config.{name}={to!r}" for name, to in changes.items()])


def run(name: str, settings: AblationSettings, report: Report, *, workdir: str, seed: int) -> Json:
    """Trains and tests a variant; see `train_and_test`."""
    return train_and_test(settings.config_of(name, seed), Path(workdir) / name / str(seed), report)


def train_and_test(config: Json, folder: Path, report: Report) -> Json:
    """Trains a model, and tests it on every view that it was trained on.

    config: as `train.py` takes it. folder: the run's workdir. Returns its cost and "scores": see
    `score`.
    """
    report(0.0, "training")
    start = time.perf_counter()
    train(config, folder)
    seconds = time.perf_counter() - start
    report(0.9, "answering")
    loaded, data = load(folder, "latest"), Experiment.from_config(config).data
    model, tokenizer = loaded.model, loaded.tokenizer
    test = prepare(data, tokenizer, model=model.config).test
    batches = {
        view: list(evaluation_batches(test, tokenizer, view, data.batch_size, seed=data.seed))
        for view in with_halves(data.views)
    }
    graphdef, params = split_model(model)
    longest = test.answer_length(tokenizer) + 1
    results = evaluate(
        graphdef, params, batches, tokenizer, step=loaded.step, max_new_tokens=longest
    )
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "flops": {view: operations(model.config, batches[view][0].batch) for view in data.views},
        "scores": score(results.answers),
        "train_seconds": seconds,
        "peak_memory_bytes": peak_memory(),
    }


def score(answers: Sequence[Answer]) -> dict[str, dict[str, list[int]]]:
    """By "view/kind", "asked" and "right": one count per scene. "view/needs both" are the questions
    of any kind that need both halves of a split scene."""
    num_scenes = 1 + max(answer.scene for answer in answers)
    counts: Any = defaultdict(lambda: {"asked": [0] * num_scenes, "right": [0] * num_scenes})
    for answer in answers:
        view, _, only = answer.view.partition("_only_")
        entries = [] if only else [f"{view}/{answer.kind}"]
        if answer.needs_both:
            entries.append(f"{view}/needs both" + (f", {only} only" if only else ""))
        for entry in entries:
            counts[entry]["asked"][answer.scene] += 1
            counts[entry]["right"][answer.scene] += answer.correct
    return dict(counts)


def operations(config: SlamV3Config, batch: Any) -> Json:
    """Operations of a forward pass over one scene: of the encoder, and of the decoder for all
    questions."""
    sizes, (_, prompts, length) = input_sizes(batch.inputs), batch.tokens.shape
    memory = num_memory(config, **sizes)
    decoder = decode_flops(config, prompts=prompts, length=length - 1, memory=memory)
    return {"encoder": encode_flops(config, **sizes), "decoder": decoder}
