"""Conversations and pictures of clients as requests to the model."""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

from slam_jax.generation import Request
from slam_jax.serving.server.fields import Fields
from slam_jax.serving.server.refusals import Refused
from slam_jax.serving.server.served import Served

_ROLES = ("system", "developer", "user", "assistant")
_IMAGE = re.compile(r"data:image/[a-z0-9.+-]{1,40}(;[a-z0-9=.+-]{1,80})*;base64", re.IGNORECASE)
_KINDS = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8[79]a|RIFF.{4}WEBP", re.DOTALL)
_JPEG, _JPEG_SCAN = b"\xff\xd8\xff", b"\xff\xda"
# A progressive JPEG has about ten; each takes as long as the whole picture, and few bytes.
_MOST_SCANS = 100
# What clients send back of an earlier answer, or add to a message, and no answer depends on.
_IGNORED = frozenset({"name", "refusal", "annotations", "reasoning_content", "id", "metadata"})
_NO_TOOLS = "this server calls no tools; leave them out"


def read_messages(given: Any, served: Served) -> list[tuple[str, str, list[bytes]]]:
    """The role, text and pictures of each message; "developer" is "system".

    Raises Refused, naming the message, for what a model cannot be told.
    """
    most = served.limits.messages
    if not isinstance(given, list) or not given:
        expected = 'a list of at least one {"role": .., "content": ..}'
        raise Refused(f"messages: expected {expected}", "messages")
    if len(given) > most:
        raise Refused(f"{len(given):,} messages; at most {most:,} are read", "messages")
    return [_read_message(message, f"messages[{i}]") for i, message in enumerate(given)]


def _read_message(given: Any, where: str) -> tuple[str, str, list[bytes]]:
    if not isinstance(given, dict):
        raise Refused(f"{where}: expected {{'role': .., 'content': ..}}", where)
    fields = Fields(given, f"{where}.")
    role = fields.text("role")
    if role in ("tool", "function"):
        raise Refused(f"{where}.role: {_NO_TOOLS}", f"{where}.role", code="unsupported")
    if role not in _ROLES:
        fields.refuse("role", role, ", ".join(_ROLES))
    for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
        fields.only(name, [], why=_NO_TOOLS if name != "audio" else "this server reads no audio")
    content = fields.take("content")
    fields.done(_IGNORED)
    if isinstance(content, str):
        return _role(role), content, []
    if not isinstance(content, list) or not content:
        fields.refuse("content", content, "a text or a list of parts")
    texts, images = [], []
    for i, part in enumerate(content):
        path = f"{where}.content[{i}]"
        text, image = _read_part(part, path)
        if image is not None and role != "user":
            raise Refused(f"{path}: pictures are read from messages of the user", path)
        texts += [] if text is None else [text]
        images += [] if image is None else [image]
    return _role(role), "\n".join(texts), images


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _read_part(given: Any, where: str) -> tuple[str | None, bytes | None]:
    """The text or the picture of a part of a message."""
    if not isinstance(given, dict):
        raise Refused(f"{where}: expected an object with a type", where)
    fields = Fields(given, f"{where}.")
    match fields.text("type"):
        case "text":
            text = fields.text("text")
            fields.done()
            if text is None:
                fields.refuse("text", None, "a text")
            return text, None
        case "image_url":
            group = fields.group("image_url")
            if group is None:
                fields.refuse("image_url", None, 'an object, as in {"url": "data:image/..."}')
            url = group.text("url")
            group.take("detail")  # how many tokens a picture costs elsewhere
            group.done()
            fields.done()
            return None, read_image(url, f"{where}.image_url.url")
        case other:
            fields.refuse("type", other, "text or image_url")


def read_image(url: Any, where: str) -> bytes:
    """The file in a data URL. Nothing else is read: no address is fetched and no file opened."""
    head, comma, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or len(head) > 400 or not _IMAGE.fullmatch(head):
        expected = "a data URL, as in data:image/png;base64,...; this server fetches nothing"
        raise Refused(f"{where}: expected {expected}", where)
    try:
        file = base64.b64decode("".join(data.split()).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise Refused(f"{where}: its data are no base64", where) from None
    # Pillow reads other kinds too, and some are programs, such as PostScript.
    if not _KINDS.match(file):
        raise Refused(f"{where}: expected the file of a PNG, JPEG, WebP or GIF picture", where)
    if file.startswith(_JPEG) and file.count(_JPEG_SCAN) > _MOST_SCANS:
        raise Refused(f"{where}: a JPEG of more than {_MOST_SCANS} scans", where)
    return file


def read_aux(fields: Fields, served: Served) -> Any:
    """Rows of numbers, or numbers by name."""
    aux, most = fields.take("aux"), served.limits.aux
    if aux is not None and not isinstance(aux, list | dict):
        fields.refuse("aux", aux, "rows of numbers, or numbers by name")
    if aux is not None and len(aux) > most:
        raise Refused(f"aux has {len(aux):,} rows; at most {most:,} are read", "aux")
    return aux


def to_request(
    messages: Sequence[tuple[str, str, list[bytes]]], aux: Any, seed: int, served: Served
) -> Request:
    """The request of a conversation, as the model takes one.

    Raises Refused where the model cannot be asked in this way.
    """
    if served.reads_inputs:
        return _to_question(messages, aux, seed)
    if not served.has_template:
        raise Refused(
            "this model has no chat template; use /v1/completions, which continues a prompt",
            "messages",
            code="unsupported",
        )
    if aux is not None or any(images for _, _, images in messages):
        what = "aux" if aux is not None else "messages"
        raise Refused("this model reads texts alone; leave pictures and aux out", what)
    turns = [{"role": role, "content": text} for role, text, _ in messages]
    return Request(seed=seed, messages=turns)


def _to_question(messages: Sequence[tuple[str, str, list[bytes]]], aux: Any, seed: int) -> Request:
    """A question to SLAM v3, which knows no earlier turns.

    The prompt is the text of the last message of the user, and the pictures are the last ones that
    were shown. So a chat client can ask again about a picture without showing it again.
    """
    asked = [(text, images) for role, text, images in messages if role == "user"]
    if not asked:
        raise Refused("messages: there is none of the user; ask something", "messages")
    shown = next((images for _, images in reversed(asked) if images), None)
    text = "\n".join(text for role, text, _ in messages if role == "system")
    return Request(asked[-1][0], text or None, shown, aux, seed)
