"""Scores of one answer against its right answers: ANLS, token F1, numbers."""

import re
import string
from collections import Counter
from collections.abc import Sequence

TOLERANCE = 0.05
"""The largest share of the right number by which an answer of `within_tolerance` may be off."""

_ANLS_THRESHOLD = 0.5
_LARGEST = 1e100  # sums of such numbers do not overflow
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(
    r"[+-]?([0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?|[0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)? ?%?",
    re.IGNORECASE,
)


def anls(predicted: str, references: Sequence[str]) -> float:
    """1 - distance / length of the most similar reference, 0 from a share of 0.5 on; in [0, 1].

    distance: Levenshtein's, of texts in lower case whose spaces are single. length: of the longer
    text. Source: Biten et al. 2019, "Scene Text Visual Question Answering", section 5. Raises
    ValueError without references.
    """
    predicted = " ".join(predicted.lower().split())
    return max(_similarity(predicted, " ".join(each.lower().split())) for each in references)


def _similarity(a: str, b: str) -> float:
    longest = max(len(a), len(b))
    if not longest:
        return 1.0
    if longest - min(len(a), len(b)) >= _ANLS_THRESHOLD * longest:  # the distance is no smaller
        return 0.0
    share = edit_distance(a, b) / longest
    return 1 - share if share < _ANLS_THRESHOLD else 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: insertions, deletions and substitutions of single letters.

    A column of the table of distances is two integers of len(a) bits. Source: Hyyrö 2003, "A
    Bit-Vector Algorithm for Computing Levenshtein and Damerau Edit Distances", figure 3.
    """
    if not a or not b:
        return len(a) + len(b)
    places: dict[str, int] = {}
    for i, letter in enumerate(a):
        places[letter] = places.get(letter, 0) | 1 << i
    all_bits, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = all_bits, 0, len(a)  # where a column rises and falls by 1
    for letter in b:
        match = places.get(letter, 0)
        diagonal = ((((match & up) + up) ^ up) | match | down) & all_bits
        right_up, right_down = (down | ~(diagonal | up)) & all_bits, up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up, right_down = (right_up << 1 | 1) & all_bits, right_down << 1 & all_bits
        up, down = (right_down | ~(diagonal | right_up)) & all_bits, right_up & diagonal
    return distance


def token_f1(predicted: str, references: Sequence[str]) -> float:
    """The largest harmonic mean of precision and recall of words, in [0, 1].

    Texts are in lower case, without punctuation and articles. A text without words equals only
    another one. Source: Rajpurkar et al. 2016, "SQuAD", section 6.1, and evaluate-v2.0.py.
    """
    found = _words(predicted)
    known = [words for words in map(_words, references) if words] or [[]]
    return max(_f1(found, words) for words in known)


def _f1(found: list[str], known: list[str]) -> float:
    if not found or not known:
        return float(found == known)
    same = sum((Counter(found) & Counter(known)).values())
    precision, recall = same / len(found), same / len(known)
    return 2 * precision * recall / (precision + recall) if same else 0.0


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def as_number(text: str) -> float | None:
    """The number that a text is: 1500, "1,500", "-2.5e3", "12%" (0.12). None for another text."""
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text.rstrip("% ").replace(",", "")) / (100 if text.endswith("%") else 1)
    return number if abs(number) <= _LARGEST else None


def absolute_error(predicted: str, references: Sequence[str]) -> float | None:
    """The distance to the nearest reference that is a number; None where there is none, or the
    answer is no number."""
    found = as_number(predicted)
    numbers = [number for number in map(as_number, references) if number is not None]
    if found is None or not numbers:
        return None
    return min(abs(found - number) for number in numbers)


def within_tolerance(predicted: str, references: Sequence[str]) -> float | None:
    """1 where a reference that is a number is at most `TOLERANCE` of itself away, else 0; None
    where no reference is a number. Source: Masry et al. 2022, "ChartQA", section 5.1."""
    found = as_number(predicted)
    numbers = [number for number in map(as_number, references) if number is not None]
    if not numbers:
        return None
    return float(found is not None and any(abs(found - x) <= TOLERANCE * abs(x) for x in numbers))
