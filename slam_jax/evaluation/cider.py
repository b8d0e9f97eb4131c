"""CIDEr of captions, as pycocoevalcap computes it for texts that are tokenised."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_ORDERS, _SIGMA, _SCALE = 4, 6.0, 10.0
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")

_Vectors = list[dict[tuple[str, ...], float]]


def tokenise(text: str) -> str:
    """Words in lower case with single spaces, without punctuation.

    Most published figures are of the Java tokeniser of Stanford, which splits "don't" in two and
    keeps some marks.
    """
    return " ".join(_WORD.findall(text.lower()))


def cider(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Float[np.ndarray, "n"]:
    """A score from 0 to 10 for each prediction, whose mean is CIDEr.

    The references are the corpus that says how rare an n-gram is. With one prediction all n-grams
    are in all documents, and the score is 0. predictions, references: words with spaces between
    them; each prediction has at least one reference.

    Clipped counts and a penalty of the length make it the variant CIDEr-D; the length counts
    2-grams and there is no stemming, as in pycocoevalcap. Source: Vedantam et al. 2015, "CIDEr:
    Consensus-based Image Description Evaluation", sections 3 and 7.
    """
    found = [_count(text) for text in predictions]
    known = [[_count(text) for text in texts] for texts in references]
    documents = Counter(ngram for texts in known for ngram in set().union(*texts))
    rarity = {ngram: np.log(len(known) / count) for ngram, count in documents.items()}
    never = np.log(max(len(known), 1))
    scores = np.zeros(len(found))
    for i, (prediction, texts) in enumerate(zip(found, known, strict=True)):
        mine = _weigh(prediction, rarity, never)
        similar = [_similarity(mine, _weigh(text, rarity, never)) for text in texts]
        scores[i] = _SCALE * np.mean(similar)
    return scores


def _count(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(
        tuple(words[i : i + n]) for n in range(1, _ORDERS + 1) for i in range(len(words) - n + 1)
    )


def _weigh(
    counts: Counter[tuple[str, ...]], rarity: dict[tuple[str, ...], float], never: float
) -> tuple[_Vectors, list[float], int]:
    """The vectors of each order, their norms, and the number of 2-grams."""
    vectors: _Vectors = [{} for _ in range(_ORDERS)]
    for ngram, count in counts.items():
        vectors[len(ngram) - 1][ngram] = count * rarity.get(ngram, never)
    norms = [sum(x * x for x in vector.values()) ** 0.5 for vector in vectors]
    return vectors, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _similarity(
    mine: tuple[_Vectors, list[float], int], theirs: tuple[_Vectors, list[float], int]
) -> float:
    total = 0.0
    for vector, norm, other, other_norm in zip(*mine[:2], *theirs[:2], strict=True):
        if norm and other_norm:
            product = sum(min(x, other.get(n, 0.0)) * other.get(n, 0.0) for n, x in vector.items())
            total += product / (norm * other_norm)
    penalty = np.exp(-((mine[2] - theirs[2]) ** 2) / (2 * _SIGMA**2))
    return float(penalty * total / _ORDERS)
