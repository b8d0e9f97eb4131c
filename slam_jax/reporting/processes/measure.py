"""What each encoder process is worth to a trained model: knock-outs, similarity, attention.

Nothing is retrained, so the figures say what the trained model relies on. They do not say what a
model without the process could have learned.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from slam_jax.array_typing import AnyArray
from slam_jax.data import AnyTokenizer, EvaluationBatch, Example
from slam_jax.evaluation.answers import Answer, evaluate, number_scenes
from slam_jax.evaluation.metrics import bootstrap_interval
from slam_jax.slam_v3 import SlamV3
from slam_jax.slam_v3.streams import join_streams
from slam_jax.training import split_model

# Scenes are divided into this many groups, one of which is left out at a time (jackknife).
_GROUPS = 8


class Sums(NamedTuple):
    """Over the tokens of each group of scenes: their count, the sums of outputs, and the sums of
    products of two outputs."""

    count: Float[AnyArray, "*G"]
    total: Float[AnyArray, "*G P D"]
    products: Float[AnyArray, "*G P P D D"]


class MixedProcesses(nnx.Module):
    """The encoder processes of a model with mixed outputs: y'_p = sum_q mixing[p, q] y_q."""

    def __init__(self, processes: nnx.Module, mixing: Float[AnyArray, "P P"]):
        self.processes, self.mixing = processes, nnx.Param(jnp.asarray(mixing))

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Float[Array, "P B S D"], Any]:
        y, weights = self.processes(*args, **kwargs)  # type: ignore[operator]
        return jnp.einsum("pq,qbsd->pbsd", self.mixing[...].astype(y.dtype), y), weights


def knock_outs(num_processes: int) -> dict[str, Float[np.ndarray, "P P"]]:
    """The mixing of each column of the table, by its name; the first one changes nothing."""
    whole = np.eye(num_processes, dtype=np.float32)
    found = {"all": whole}
    for p in range(num_processes):
        found[f"without p{p}"] = whole * (np.arange(num_processes) != p)[:, None]
    if num_processes > 1:
        found["all zeroed"] = np.zeros_like(whole)
        found["each the mean"] = np.full_like(whole, 1 / num_processes)
    return found


def mix_outputs(model: SlamV3, mixing: Float[AnyArray, "P P"]) -> SlamV3:
    """The model with mixed outputs of its processes, y'_p = sum_q mixing[p, q] y_q; the given model
    is not changed. `knock_outs` has mixings that leave processes out.

    Mixed models are equal but for the numbers of the mixing, so that a jitted function is compiled
    once for all of them.
    """
    graphdef, state = nnx.split(model)
    mixed: Any = nnx.merge(graphdef, state)
    mixed.processes = MixedProcesses(mixed.processes, jnp.asarray(mixing, jnp.float32))
    return mixed


def measure_processes(
    model: SlamV3,
    tokenizer: AnyTokenizer,
    batches_by_view: Mapping[str, Sequence[EvaluationBatch]],
    *,
    max_new_tokens: int,
) -> dict[str, Any]:
    """The figures as JSON, all with 95% intervals.

    "accuracy": by view, kind of question and knock-out, the accuracy and its difference to the
    whole model, by bootstrap over scenes. "similarity": by view and pair of processes, linear CKA
    (Kornblith et al. 2019, section 3) of all tokens, by jackknife, and the mean cosine of a token's
    two outputs. "attention": by view, process and stream, the share of the shared attention that
    goes to this stream; only where there are several streams.
    """
    answers: dict[str, list[Answer]] = {}
    graphdef, params = split_model(mix_outputs(model, np.eye(model.config.num_processes)))
    for name, mixing in knock_outs(model.config.num_processes).items():
        params["processes"]["mixing"] = jnp.asarray(mixing)
        found = evaluate(
            graphdef, params, batches_by_view, tokenizer, step=0, max_new_tokens=max_new_tokens
        )
        answers[name] = found.answers
    observed = {view: _observe_view(model, batches) for view, batches in batches_by_view.items()}
    return {
        "processes": model.config.num_processes,
        "examples": max(sum(b.valid for b in batches) for batches in batches_by_view.values()),
        "accuracy": _accuracies(answers),
        "similarity": {view: found[0] for view, found in observed.items()},
        "attention": {view: found[1] for view, found in observed.items() if found[1]},
    }


def _accuracies(answers: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """By view, kind and knock-out; the answers of all knock-outs are to the same questions."""
    whole, found = next(iter(answers.values())), {}
    for view, kind in dict.fromkeys((answer.view, answer.kind) for answer in whole):
        rows = [i for i, a in enumerate(whole) if (a.view, a.kind) == (view, kind)]
        scenes = np.unique([whole[i].scene for i in rows], return_inverse=True)[1]
        right = {
            name: np.array([each[i].correct for i in rows], np.float64)
            for name, each in answers.items()
        }
        first = right["all"]
        found.setdefault(view, {})[kind] = {
            "n": len(rows),
            **{
                name: {"accuracy": _interval(x, scenes), "difference": _interval(x - first, scenes)}
                for name, x in right.items()
            },
        }
    return found


def _interval(values: Float[np.ndarray, "n"], scenes: np.ndarray) -> dict[str, float]:
    by_scene = [values[scenes == scene] for scene in range(scenes.max() + 1)]
    return bootstrap_interval(by_scene, seed=0)._asdict()


def _observe_view(model: SlamV3, batches: Sequence[EvaluationBatch]) -> tuple[list[Any], list[Any]]:
    """The similarities of the outputs of a view, and what the processes attend to."""
    found: list[Any] = []
    scenes = _scenes([example for each in batches for example in each.examples])
    start = 0
    for batch, _, valid in batches:
        groups = np.zeros((len(batch.tokens), _GROUPS), np.float32)  # rows beyond repeat an example
        groups[:valid] = np.eye(_GROUPS)[scenes[start : start + valid] % _GROUPS]
        start += valid
        sums, by_scene = jax.device_get(_observe(model, batch.inputs, groups))
        found.append((sums, [x[:valid] for x in by_scene]))
    sums = Sums(*(np.sum(parts, axis=0) for parts in zip(*(s for s, _ in found), strict=True)))
    cosine, shares = (
        np.concatenate(parts) for parts in zip(*(by_scene for _, by_scene in found), strict=True)
    )
    num_processes = model.config.num_processes
    similarity = [
        {
            "pair": [p, q],
            "cka": _jackknife(sums, p, q),
            "cosine": _interval(cosine[:, p, q], scenes),
        }
        for p, q in itertools.combinations(range(num_processes), 2)
    ]
    inputs = batches[0].batch.inputs
    names = [name for name in ("text", "image", "aux") if getattr(inputs, name) is not None]
    attention = [
        {name: _interval(shares[:, p, i], scenes) for i, name in enumerate(names)}
        for p in range(num_processes)
        if len(names) > 1 and model.config.has("shared")
    ]
    return similarity, attention


def _scenes(examples: Sequence[Example]) -> np.ndarray:
    """The number of the scene of each example, from 0 on without gaps."""
    shown = {i if e.record is None else e.record: e.contents for i, e in enumerate(examples)}
    return np.unique(list(number_scenes(shown).values()), return_inverse=True)[1]


@jax.jit
def _observe(model: SlamV3, inputs: Any, groups: Float[AnyArray, "B G"]) -> Any:
    """The `Sums`; by scene, the cosines of pairs of outputs and the attention of each process to
    each stream."""
    y, streams, weights = model.run_processes(inputs, attention=True)
    y, mask = y.astype(jnp.float32), join_streams(streams).mask
    real = jnp.ones(y.shape[1:3]) if mask is None else mask.astype(jnp.float32)
    inside = groups.T[..., None] * real[None]
    sums = Sums(
        inside.sum(axis=(1, 2)),
        jnp.einsum("gbs,pbsd->gpd", inside, y),
        jnp.einsum("gbs,pbsd,qbse->gpqde", inside, y, y),
    )
    count = jnp.maximum(real.sum(axis=1), 1.0)
    unit = y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-12)
    cosine = jnp.einsum("pbsd,qbsd,bs->bpq", unit, unit, real) / count[:, None, None]
    if weights is None:  # an ablated model without shared attention
        return sums, (cosine, jnp.zeros((*cosine.shape[:2], len(streams))))
    read = jnp.einsum("pbtk,bt->bpk", weights.mean(axis=(2, 3)), real) / count[:, None, None]
    ends = np.cumsum([stream.tokens.shape[1] for stream in streams])
    parts = jnp.split(read, ends[:-1].tolist(), axis=-1)
    return sums, (cosine, jnp.stack([part.sum(axis=-1) for part in parts], axis=-1))


def _jackknife(sums: Sums, p: int, q: int) -> dict[str, float]:
    """CKA of two processes and its 95% interval: the variance is that over the results without one
    group of scenes each. Source: Efron and Tibshirani 1993, chapter 11."""
    all_groups = Sums(*(x.sum(axis=0) for x in sums))
    groups = np.flatnonzero(sums.count)
    left = [
        _cka(Sums(*(x - part[g] for x, part in zip(all_groups, sums, strict=True))), p, q)
        for g in groups
        if len(groups) > 1
    ]
    whole = _cka(all_groups, p, q)
    spread = 1.96 * np.std(left) * np.sqrt(len(left) - 1) if left else 0.0
    return {
        "mean": whole,
        "low": max(float(whole - spread), 0.0),
        "high": min(float(whole + spread), 1.0),
    }


def _cka(sums: Sums, p: int, q: int) -> float:
    def covariance(i: int, j: int) -> Any:
        return sums.products[i, j] - np.outer(sums.total[i], sums.total[j]) / sums.count

    above, first, second = (np.linalg.norm(covariance(*pair)) for pair in ((p, q), (p, p), (q, q)))
    return float(above**2 / max(first * second, 1e-30))
