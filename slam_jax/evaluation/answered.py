"""Answers to evaluation questions, their slices, and the file that keeps them."""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slam_jax.errors import InputError, first_line, shorten, write_whole

ANSWERS = "answers.jsonl"
_MOST_BYTES = 1 << 30
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "view": str,
    "scene": int,
    "record": (int, type(None)),
    "place": str,
    "kind": str,
    "needs_both": bool,
    "prompt": str,
    "expected": str,
    "references": list,
    "predicted": str,
    "logprob": (int, float, type(None)),
}


class Answer(NamedTuple):
    """One question about an example of a view, and the model's answer to it.

    scene: the number of the first record that shows the same; intervals resample scenes. record:
    the number of the record itself; None in files of version 0.27 or older,
    where it is that of the scene.
    expected: a right answer, the one that the example was drawn with. predicted: what the model
    wrote. logprob: of exactly that text, in nats. references: all right answers; () = `expected`
    alone. place: where the example was read, for people.
    """

    view: str
    scene: int
    kind: str
    needs_both: bool
    prompt: str
    expected: str
    predicted: str
    logprob: float
    references: tuple[str, ...] = ()
    place: str = ""
    record: int | None = None

    @property
    def number(self) -> int:
        """The number of the record."""
        return self.scene if self.record is None else self.record

    @property
    def accepted(self) -> tuple[str, ...]:
        """All right answers."""
        return self.references or (self.expected,)

    @property
    def correct(self) -> bool:
        """Whether the answer is one of the right ones, but for spaces around it."""
        predicted = self.predicted.strip()
        return any(predicted == answer.strip() for answer in self.accepted)

    @property
    def usual(self) -> str:
        """The most frequent of the right answers; the first of equally frequent ones."""
        return Counter(answer.strip() for answer in self.accepted).most_common(1)[0][0]


def group_by_slice(answers: Iterable[Answer]) -> dict[tuple[str, str], list[Answer]]:
    """The answers of each (view, entry of the table).

    An entry is a kind of question, or "needs_both" with the questions that need both halves of a
    split scene; those that saw one half alone, in the view X_only_Y, are "needs_both_Y_only" of X.
    """
    groups: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in answers:
        view, _, only = answer.view.partition("_only_")
        if not only:
            groups[view, answer.kind].append(answer)
        if answer.needs_both:
            groups[view, f"needs_both_{only}_only" if only else "needs_both"].append(answer)
    return dict(groups)


def write_answers(path: str | os.PathLike[str], answers: Iterable[Answer]) -> None:
    """Writes a line of JSON for each answer. A log-probability that is not finite becomes null.

    Raises WriteError where the file cannot be written; an older one is then kept.
    """
    lines = []
    for answer in answers:
        values: dict[str, Any] = {name: getattr(answer, name) for name in _FIELDS}
        values["references"] = list(answer.accepted)
        values["logprob"] = answer.logprob if math.isfinite(answer.logprob) else None
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def read_answers(path: str | os.PathLike[str]) -> list[Answer]:
    """The answers of a file that `write_answers` wrote.

    Raises InputError, with the line, where it is something else or larger than 1 GiB.
    """
    path, found = Path(path), []
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise InputError(f"{path}: expected a file of at most {_MOST_BYTES >> 30} GiB")
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                found.append(_parse(line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {first_line(error)}") from None
    if not found:
        raise InputError(f"{path}: it has no answer")
    return found


def _parse(line: str, where: str) -> Answer:
    advice = "expected a line that slam-eval wrote"
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({first_line(error)}); {advice}") from None
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: no object; {advice}")
    for name, kind in _FIELDS.items():
        value = values.get(name)
        fits = isinstance(value, kind) and (isinstance(value, bool) == (kind is bool))
        if isinstance(value, list):
            fits = fits and all(isinstance(each, str) for each in value)
        if not fits:
            raise InputError(f"{where}: {name} is {shorten(repr(value), 60)}; {advice}")
    known: dict[str, Any] = {name: values.get(name) for name in _FIELDS}
    try:
        logprob = math.nan if known["logprob"] is None else float(known["logprob"])
        for text in (values["prompt"], values["predicted"], *values["references"]):
            text.encode()
    except (OverflowError, UnicodeEncodeError) as error:
        raise InputError(f"{where}: {first_line(error)}; {advice}") from None
    return Answer(**known | {"references": tuple(values["references"]), "logprob": logprob})
