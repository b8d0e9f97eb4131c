"""Figures with honest uncertainty: intervals over scenes, retrieval with pessimistic ties."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Float


class Interval(NamedTuple):
    """A share of right answers and its 95% interval, all in [0, 1]."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    correct_by_scene: Iterable[npt.ArrayLike], *, seed: int, resamples: int = 2000
) -> Interval:
    """Share of right answers over all questions, with its 95% percentile bootstrap interval.

    Scenes are resampled, not questions: the questions of one scene stand or fall together, and
    treating them as independent would make the interval too narrow. A scene weighs as much as it
    has questions. Where every answer is right (or wrong) the interval has no width, as always with
    this bootstrap. Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), ch. 13.

    Args:
      correct_by_scene: for each scene, whether each of its questions was answered rightly; scenes
        may differ in their number of questions and have none.

    Raises:
      ValueError: there is no question at all.
    """
    scenes = [scene for scene in correct_by_scene if np.size(scene)]
    if not scenes:
        raise ValueError("no question to average over; give at least one scene that has one")
    right = np.array([np.sum(scene) for scene in scenes], np.float64)
    count = np.array([np.size(scene) for scene in scenes], np.float64)
    draws = np.random.default_rng(seed).multinomial(
        len(scenes), np.full(len(scenes), 1 / len(scenes)), size=resamples
    )
    low, high = np.quantile(draws @ right / (draws @ count), [0.025, 0.975])
    return Interval(float(right.sum() / count.sum()), float(low), float(high))


class Calibration(NamedTuple):
    """Answers in bins of like confidence, those that have any.

    confidence, accuracy: means of each bin, in [0, 1]. counts: its answers. error: the expected
    calibration error, the mean of |confidence - accuracy| weighed by count.
    """

    confidence: Float[np.ndarray, "bins"]
    accuracy: Float[np.ndarray, "bins"]
    counts: tuple[int, ...]
    error: float


def calibration(
    confidence: Float[np.ndarray, "n"], correct: Float[np.ndarray, "n"], num_bins: int = 10
) -> Calibration:
    """How often answers of like confidence are right, in `num_bins` bins of equal width.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2.
    """
    place = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    filled = [np.flatnonzero(place == i) for i in range(num_bins)]
    filled = [members for members in filled if len(members)]
    sure = np.array([confidence[members].mean() for members in filled])
    right = np.array([correct[members].mean() for members in filled])
    counts = np.array([len(members) for members in filled])
    error = float((np.abs(sure - right) * counts).sum() / max(counts.sum(), 1))
    return Calibration(sure, right, tuple(counts.tolist()), error)


def recall_at_k(queries: Float[np.ndarray, "N E"], keys: Float[np.ndarray, "N E"], k: int) -> float:
    """Share of queries whose own key (the same row) is among the `k` with the largest dot product.

    A key as similar as the own one, to within float32 rounding, counts as ahead of it, so
    embeddings that have collapsed to one point score 0 and not 1.
    """
    similarity = np.asarray(queries, np.float64) @ np.asarray(keys, np.float64).T
    # Written as "not behind", so that a NaN is a miss.
    ahead = ~(similarity < np.diag(similarity)[:, None] - 1e-6)
    return float(np.mean(ahead.sum(axis=1) <= k))


def retrieval_metrics(
    text: Float[np.ndarray, "N E"], image: Float[np.ndarray, "N E"]
) -> dict[str, dict[str, float] | int]:
    """Recall@1 and @5 between the text and the image embedding of the same N scenes, both ways."""

    def recalls(queries, keys):
        return {f"recall@{k}": recall_at_k(queries, keys, k) for k in (1, 5)}

    return {
        "text_to_image": recalls(text, image),
        "image_to_text": recalls(image, text),
        "n": len(text),
    }
