"""Bootstrap intervals over scenes, calibration, and recall at k."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

_LARGEST_BLOCK = 1 << 24  # numbers of the draws that are in memory at a time


class Interval(NamedTuple):
    """A share of right answers and its 95% interval, all in [0, 1]."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    correct_by_scene: Iterable[npt.ArrayLike], *, seed: int, resamples: int = 2000
) -> Interval:
    """Share of right answers over all questions, with its 95% percentile bootstrap interval.

    Scenes are resampled, not questions, because answers about one scene are correlated. A scene
    counts once for each of its questions. If all answers are right (or all wrong), the interval has
    width 0. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    correct_by_scene: for each scene, whether the answer to each of its questions is right; scenes
    may have different numbers of questions. Raises ValueError if no scene has one.
    """
    scenes = [scene for scene in correct_by_scene if np.size(scene)]
    if not scenes:
        raise ValueError("no question to average over; give at least one scene that has one")
    right = np.array([np.sum(scene) for scene in scenes], np.float64)
    count = np.array([np.size(scene) for scene in scenes], np.float64)
    sums = np.stack([right, count], axis=1)
    [drawn] = resample_scenes([sums], seed=seed, resamples=resamples)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return Interval(float(right.sum() / count.sum()), float(low), float(high))


def resample_scenes(
    sums: Sequence[Float[np.ndarray, "scenes _"]], *, seed: int, resamples: int = 2000
) -> list[Float[np.ndarray, "resamples _"]]:
    """Sums over as many scenes, drawn with replacement, for each of several arrays.

    All arrays see the same draws, which depend on (seed, number of scenes) alone. So differences of
    what is computed from two of the results are those of a paired bootstrap.
    """
    scenes = len(sums[0])
    rng, chances = np.random.default_rng(seed), np.full(scenes, 1 / scenes)
    found: list[list[np.ndarray]] = [[] for _ in sums]
    block = max(1, _LARGEST_BLOCK // scenes)
    for start in range(0, resamples, block):
        draws = rng.multinomial(scenes, chances, size=min(block, resamples - start))
        draws = draws.astype(np.float64)
        for parts, array in zip(found, sums, strict=True):
            parts.append(draws @ array)
    return [np.concatenate(parts) for parts in found]


def sum_by_scene(
    values: Float[np.ndarray, "n K"], scenes: Int[np.ndarray, "n"]
) -> Float[np.ndarray, "scenes K"]:
    """Sums of the rows of each scene, in the order of the numbers of the scenes."""
    known, index = np.unique(scenes, return_inverse=True)
    sums = np.zeros((len(known), values.shape[1]))
    np.add.at(sums, index, values)
    return sums


class Calibration(NamedTuple):
    """Means of the answers in each bin of similar confidence that is not empty, and their counts.
    error: expected calibration error, the mean of |confidence - accuracy| weighted by count."""

    confidence: Float[np.ndarray, "bins"]
    accuracy: Float[np.ndarray, "bins"]
    counts: tuple[int, ...]
    error: float


def calibration(
    confidence: Float[np.ndarray, "n"], correct: Float[np.ndarray, "n"], num_bins: int = 10
) -> Calibration:
    """Mean confidence and accuracy in `num_bins` bins of equal width. Source: Guo et al. 2017, "On
    Calibration of Modern Neural Networks", section 2."""
    index = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    bins, index, counts = np.unique(index, return_inverse=True, return_counts=True)
    sure, right = (np.bincount(index, x, len(bins)) / counts for x in (confidence, correct))
    error = float((np.abs(sure - right) * counts).sum() / max(counts.sum(), 1))
    return Calibration(sure, right, tuple(counts.tolist()), error)


def recall_at_k(
    queries: Float[np.ndarray, "scenes embed"], keys: Float[np.ndarray, "scenes embed"], k: int
) -> float:
    """Share of queries whose own key (same row) is among the `k` keys with the largest dot product.

    Keys that are as similar as the own one, up to float32 rounding, rank before it: embeddings that
    have collapsed to one point score 0 and not 1.
    """
    similarity = np.asarray(queries, np.float64) @ np.asarray(keys, np.float64).T
    # "Not behind" and not "ahead": a NaN counts as a miss.
    ahead = ~(similarity < np.diag(similarity)[:, None] - 1e-6)
    return float(np.mean(ahead.sum(axis=1) <= k))


def retrieval_metrics(
    text: Float[np.ndarray, "scenes embed"], image: Float[np.ndarray, "scenes embed"]
) -> dict[str, dict[str, float] | int]:
    """Recall@1 and @5 between text and image embeddings of the same scenes, both ways."""

    pairs = {"text_to_image": (text, image), "image_to_text": (image, text)}
    recalls = {
        name: {f"recall@{k}": recall_at_k(*pair, k) for k in (1, 5)} for name, pair in pairs.items()
    }
    return {**recalls, "n": len(text)}
