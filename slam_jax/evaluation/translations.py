"""BLEU and chrF through sacrebleu, as sums over answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from slam_jax.errors import InputError

_BLEU_ORDERS, _CHRF_ORDERS, _BETA = 4, 6, 2


def require_sacrebleu() -> Any:
    """The module. Raises InputError, with the command that installs it, where it is missing."""
    try:
        import sacrebleu
    except ImportError:
        raise InputError(
            "BLEU and chrF need sacrebleu; install it with pip install 'slam_jax[metrics]'"
        ) from None
    return sacrebleu


def bleu_counts(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Float[np.ndarray, "n 10"]:
    """For each prediction: its length, that of the closest reference, matching n-grams of four
    orders, and all n-grams of four orders; with the tokeniser "13a"."""
    scorer = require_sacrebleu().BLEU(effective_order=True)  # it changes no count
    rows = np.zeros((len(predictions), 2 + 2 * _BLEU_ORDERS))
    for row, predicted, known in zip(rows, predictions, references, strict=True):
        found = scorer.sentence_score(predicted, list(known))
        row[:] = (found.sys_len, found.ref_len, *found.counts, *found.totals)
    return rows


def bleu(sums: Float[np.ndarray, "r 10"]) -> Float[np.ndarray, "r"]:
    """BLEU of 0 to 100 from sums of `bleu_counts`, with exponential smoothing as in sacrebleu.

    0 where no n-gram of some order was predicted, as with answers of fewer than four words. Source:
    Papineni et al. 2002, "BLEU", section 2.3; Post 2018, "A Call for Clarity in Reporting BLEU
    Scores".
    """
    length, closest = sums[..., 0], sums[..., 1]
    matches, totals = np.split(sums[..., 2:], 2, axis=-1)
    smooth, logs = np.ones(length.shape), np.zeros(length.shape)
    for n in range(_BLEU_ORDERS):
        smooth = np.where(matches[..., n] == 0, 2 * smooth, smooth)
        counted = np.where(matches[..., n] == 0, 1 / smooth, matches[..., n])
        logs = logs + np.log(counted / np.maximum(totals[..., n], 1))
    brevity = np.minimum(1 - closest / np.maximum(length, 1), 0)
    scores = 100 * np.exp(logs / _BLEU_ORDERS + brevity)
    scored = (matches.sum(axis=-1) > 0) & (totals > 0).all(axis=-1)
    return np.where(scored, scores, 0.0)


def chrf_counts(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Float[np.ndarray, "n 18"]:
    """For each prediction and six orders of letters: its n-grams, those of its most similar
    reference, and those that match."""
    scorer = require_sacrebleu().CHRF()
    rows = [
        scorer._extract_corpus_statistics([predicted], [[each] for each in known])[0]
        for predicted, known in zip(predictions, references, strict=True)
    ]
    return np.array(rows, np.float64).reshape(-1, 3 * _CHRF_ORDERS)


def chrf(sums: Float[np.ndarray, "r 18"]) -> Float[np.ndarray, "r"]:
    """chrF2 of 0 to 100 from sums of `chrf_counts`. Source: Popović 2015, "chrF: character n-gram
    F-score for automatic MT evaluation", section 2."""
    found, known, matches = (sums[..., i::3] for i in range(3))
    used = (found > 0) & (known > 0)
    orders = np.maximum(used.sum(axis=-1), 1)
    precision, recall = (
        np.where(used, matches / np.maximum(counts, 1), 0).sum(axis=-1) / orders
        for counts in (found, known)
    )
    below = _BETA**2 * precision + recall
    return 100 * (1 + _BETA**2) * precision * recall / np.where(below > 0, below, 1)
