"""VQA accuracy: how many of ten people gave the same answer, after the official normalisation."""

import re
from collections.abc import Sequence

LEAST_REFERENCES = 4
"""With fewer answers nothing can score 1."""

_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_NUMBERS = dict(
    none="0", zero="0", one="1", two="2", three="3", four="4", five="5",
    six="6", seven="7", eight="8", nine="9", ten="10",
)  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
_PERIOD = re.compile(r"\.(?![0-9])")
_COMMA_IN_NUMBER = re.compile(r"[0-9],[0-9]")
_MOST_PERIODS = 32  # the official code passes re.UNICODE, 32, as the count of `re.sub`
_SPELLINGS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# By a spelling that lacks one of the apostrophes. The last is the other way round in the source.
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _SPELLINGS.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_accuracy(predicted: str, references: Sequence[str]) -> float:
    """The mean of min(matches / 3, 1) over all choices of all references but one, in [0, 1].

    Texts are normalised unless all references are equal, as in the official code. Source: Antol et
    al. 2015, "VQA: Visual Question Answering", section 3.3, and vqaEval.py of GT-Vision-Lab/VQA.
    Raises ValueError without references.
    """
    if not references:
        raise ValueError("vqa_accuracy needs at least one reference")
    predicted, *references = (_flatten(text) for text in (predicted, *references))
    if len(set(references)) > 1:
        predicted, *references = (normalise(text) for text in (predicted, *references))
    matches = [reference == predicted for reference in references]
    total = sum(matches)
    return sum(min((total - match) / 3, 1.0) for match in matches) / len(matches)


def normalise(text: str) -> str:
    """The text in lower case with digits for number words, and without punctuation and articles."""
    stripped = text
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space or in_number else " ")
    stripped = _PERIOD.sub("", stripped, count=_MOST_PERIODS)
    words = [_NUMBERS.get(word, word) for word in stripped.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _flatten(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
