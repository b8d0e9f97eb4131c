"""Conversations as LLaVA writes them: each turn is a row."""

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

from slam_jax.data.formats.base import Found, Located, Record

_KEYS = ("conversations", "messages")
_ROLES = {
    **dict.fromkeys(("human", "user"), "prompt"),
    **dict.fromkeys(("gpt", "assistant", "model"), "answer"),
    "system": "system",
}
_CHAT_ROLES = {"prompt": "user", "answer": "assistant", "system": "system"}
_MARKERS = ("<image>", "<video>")
_NAMES = {"image": ("image", "images"), "prompt": ("prompt",), "answer": ("answer",)}
_NAMES |= {"kind": ("kind",), "split": ("split",)}
_MOST_TURNS = 1_000


def holds_conversations(record: Record) -> bool:
    """Whether a record is a conversation: `{"image": ..., "conversations": [{"from": "human",
    "value": ...}, {"from": "gpt", "value": ...}]}`, or `messages` with `role` and `content`."""
    return "answer" not in record and any(_is_turns(record.get(key)) for key in _KEYS)


def as_turns(found: Found) -> Found:
    """The same data with a row for each answer. The prompt of a later turn holds the conversation
    before it, a line for each turn; `Located.messages` has it with its roles."""
    read = functools.partial(_read, found)
    name = f"conversations, {found.name}"
    return dataclasses.replace(found, name=name, read=read, aliases=_NAMES, own=False)


def _read(found: Found) -> Iterator[Located]:
    for located in found.read():
        record = located.record
        if isinstance(record, str):
            yield located
            continue
        others = {name: record[name] for name in ("kind", "split") if name in record}
        pictures = record.get("images") if record.get("image") is None else record["image"]
        if pictures is not None:
            others["image"] = pictures
        for turn in _rows(record):
            if isinstance(turn, str):
                yield located._replace(record=turn)
                continue
            before, answer = turn
            prompt = "\n".join(message["content"] for message in before)
            row = {**others, "prompt": prompt, "answer": answer}
            yield located._replace(record=row, messages=before)


def _rows(record: Record) -> Iterator[tuple[tuple[dict[str, str], ...], str] | str]:
    """The messages before each answer and the answer, or why there are none."""
    turns = next((record[key] for key in _KEYS if _is_turns(record.get(key))), None)
    if turns is None:
        yield f"no list of turns in {' or '.join(_KEYS)}"
        return
    if len(turns) > _MOST_TURNS:
        yield f"a conversation of {len(turns):,} turns; at most {_MOST_TURNS:,} are read"
        return
    before: list[dict[str, str]] = []
    asked = False
    for turn in turns:
        role, text = _turn(turn)
        if role is None:
            yield f"a turn of {turn.get('from', turn.get('role'))!r:.60}; expected human or gpt"
            return
        if text is None:
            yield "a turn whose text is no text"
            return
        if role == "answer" and asked:
            yield tuple(before), text
        asked = role == "prompt"
        before.append({"role": _CHAT_ROLES[role], "content": text})
    if not any(_turn(turn)[0] == "answer" for turn in turns):
        yield "a conversation without an answer"


def _turn(turn: Record) -> tuple[str | None, str | None]:
    """The role of a turn, None for an unknown one, and its text without markers of pictures, None
    where it has none."""
    text = turn.get("value", turn.get("content"))
    if isinstance(text, list):  # parts, as chat models have them
        parts = [part.get("text") if isinstance(part, dict) else part for part in text]
        given = [part for part in parts if part is not None]
        text = "\n".join(given) if all(isinstance(part, str) for part in given) else None
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = json.dumps(text)
    if not isinstance(text, str):
        return _ROLES.get(str(turn.get("from", turn.get("role")))), None
    for marker in _MARKERS:
        text = text.replace(marker, "")
    return _ROLES.get(str(turn.get("from", turn.get("role")))), text.strip()


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)
