"""The files of a tokenizer on the hub: what they are called, and what their fields say."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from slam_jax.data.tokenizer import check_unicode
from slam_jax.errors import InputError, first_line, is_whole, shorten
from slam_jax.runtime.files import read_limited

FILE, CONFIG, GENERATION, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token")

_LARGEST, _LARGEST_CONFIG = 1 << 26, 1 << 24  # bytes; Gemma's tokenizer has 33 MB
_SPACE = "\u2581"  # how SentencePiece writes a space


class HubFiles(NamedTuple):
    """The contents of tokenizer.json, tokenizer_config.json and generation_config.json.

    ids: in config.json, for what generation_config.json does not say.
    """

    text: str
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    ids: Mapping[str, Any] = {}


def read_files(folder: str | Path) -> HubFiles:
    """The files in a folder of the hub, or of a tokenizer.json with what is beside it.

    Raises InputError, naming the file, where one is missing or damaged.
    """
    folder = Path(folder)
    file = folder / FILE if folder.is_dir() else folder
    text, beside = read_limited(file, _LARGEST), file.parent
    config, generation, model = (
        _read(beside / name) for name in (CONFIG, GENERATION, "config.json")
    )
    if (beside / TEMPLATE).exists():
        config["chat_template"] = read_limited(beside / TEMPLATE, 1 << 20)
    return HubFiles(text, config, generation, {key: model.get(key) for key in IDS})


def parse_tokenizer(text: str) -> tokenizers.Tokenizer:
    """A tokenizer.json. Raises InputError for another text.

    `truncation` and `padding` in the file are left out: they are what the last program that used
    the tokenizer had chosen, and would cut texts, or pad them, without a message.
    """
    try:
        model = tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises the bare type, and its panics are no errors
        raise InputError(f"tokenizer: not a tokenizer.json ({shorten(str(error), 120)})") from None
    model.no_truncation()
    model.no_padding()
    return model


def parse_group(text: str, name: str) -> dict[str, Any]:
    """A JSON object. Raises InputError, with the name, for another text."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON ({first_line(error)})") from None
    if not isinstance(data, dict):
        raise InputError(f"{name}: expected a group of fields")
    return data


def read_token(config: Mapping[str, Any], name: str) -> str | None:
    """The text of a special token, which may be a group with a field `content`."""
    value = config.get(name)
    value = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(value, str) or not value:
        return None
    check_unicode(value, name)
    return value


def read_template(value: Any) -> str | None:
    """The chat template; of several by name, the default one."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        named = (x for x in value if isinstance(x, Mapping) and isinstance(x.get("name"), str))
        value = {x["name"]: x.get("template") for x in named}
    if isinstance(value, Mapping):
        value = value.get("default")
    if not isinstance(value, str):
        return None
    check_unicode(value, "chat template")
    return value


def read_ids(data: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """One id or several. Raises InputError for anything else."""
    value = data.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(is_whole, ids)):
        raise InputError(f"{key} is {shorten(repr(value), 60)}; expected a token id, or a list")
    return tuple(dict.fromkeys(ids))


def sentence_piece(piece: str) -> bytes:
    """The bytes of a piece of SentencePiece: a space is U+2581, and a single byte is <0x41>."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace(_SPACE, " ").encode()


def _read(path: Path) -> dict[str, Any]:
    """The fields of a JSON file; none without the file."""
    return parse_group(read_limited(path, _LARGEST_CONFIG), str(path)) if path.exists() else {}
