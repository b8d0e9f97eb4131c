"""Trains SLAM v3 with other encoder processes, and scores it on fresh test scenes."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from slam_jax.data import EvaluationBatch, Source, evaluation_batches, prepare
from slam_jax.data.fresh_scenes import FreshScenes
from slam_jax.evaluation.likelihood import Likelihood, answer_likelihood
from slam_jax.evaluation.metrics import calibration
from slam_jax.rocket.ablation.measure import AblationSettings, operations
from slam_jax.rocket.tasks import Json, Report
from slam_jax.training import Experiment, Loaded, load, override, split_model, train

# Test scenes are summed up in this many groups, over which intervals are computed.
GROUPS = 100
# The first is the first endpoint: three objects are in the image, the other three in the text.
VIEW = "split_image_text"


@dataclasses.dataclass(frozen=True)
class ProcessSettings(AblationSettings):
    """As in `AblationSettings`, and:

    tuning_seeds: of runs that choose the learning rate, other ones than `seeds`. learning_rates:
      each variant tries all of them. num_scenes: fresh test scenes, a multiple of 100.
    """

    tuning_seeds: Sequence[int] = (100, 101)
    learning_rates: Sequence[float] = (1e-3, 2e-3, 4e-3)
    more_learning_rates: int = 0
    num_scenes: int = 2_000


def run(
    name: str,
    settings: ProcessSettings,
    report: Report,
    *,
    workdir: str,
    seed: int,
    learning_rate: float,
    trial: bool,
) -> Json:
    """Trains a variant. A trial has only its loss on the validation scenes; other runs are scored
    under all conditions."""
    rate = f"--config.optimizer.learning_rate={learning_rate!r}"
    config = override(settings.config_of(name, seed), [rate])
    folder = Path(workdir) / name / f"{learning_rate:g}" / str(seed)
    report(0.0, "training")
    train(config, folder)
    report(0.9, "scoring")
    loaded, data = load(folder, "latest"), Experiment.from_config(config).data
    tokenizer, size = loaded.tokenizer, data.batch_size
    if trial:
        validation = prepare(data, tokenizer, model=loaded.model.config).validation
        batches = evaluation_batches(validation, tokenizer, VIEW, size, seed=data.seed)
        return {"validation_loss": float(_score(loaded, batches).nats.mean())}
    scores = {}
    for condition, (source, view) in conditions(settings.num_scenes).items():
        batches = list(evaluation_batches(source, tokenizer, view, size, seed=0))
        scores[condition] = _summary(_score(loaded, batches))
        scores[condition]["flops"] = operations(loaded.model.config, batches[0].batch)
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(split_model(loaded.model)[1])),
        "flops": scores["both streams"]["flops"],
        "conditions": {
            name: {key: x for key, x in each.items() if key != "flops"}
            for name, each in scores.items()
        },
    }


def conditions(num_scenes: int) -> dict[str, tuple[Source, str]]:
    """The scenes and the view of each condition; the first one is that of the first endpoint."""
    scenes = FreshScenes(num_scenes)
    return {
        "both streams": (scenes, VIEW),
        "the same in both": (scenes, "image_text"),
        "image missing": (scenes, "text"),
        "text missing": (scenes, "image"),
        "pixel noise": (FreshScenes(num_scenes, noise=32.0), VIEW),
        "8 objects": (FreshScenes(num_scenes, num_objects=8), VIEW),
    }


def _score(loaded: Loaded, batches: Iterable[EvaluationBatch]) -> Likelihood:
    return answer_likelihood(*split_model(loaded.model), batches)


def _summary(found: Likelihood) -> Json:
    """Sums over the questions of each group of scenes, and the calibration error."""
    groups = np.array_split(np.arange(len(found.nats)), GROUPS)
    error = calibration(found.confidence.ravel(), found.right.ravel().astype(np.float64)).error
    return {
        "nats": [round(float(found.nats[group].sum()), 3) for group in groups],
        "right": [int(found.right[group].sum()) for group in groups],
        "asked": [found.right[group].size for group in groups],
        "calibration_error": error,
    }
