"""The tokenizer of a GGUF file, as the text of a tokenizer.json.

The rules: llama.cpp, src/llama-vocab.cpp. The patterns are those of the publishers' tokenizer.json,
which it quotes.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from slam_jax.errors import InputError, first_line, is_whole
from slam_jax.interop.gguf_header import Header, shown

# `tokenizer.ggml.token_type`.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
# SentencePiece has these ids, where a file names no others.
_SENTENCE_PIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
_LONGEST_PIECE = 512  # letters; SentencePiece makes pieces of at most 16

_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"
_SHORTENED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_SHORTENED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_SPACES}"
_LLAMA_3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN_2 = rf"{_WORDS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


class _Splitting(NamedTuple):
    """How text is split before bytes are merged.

    patterns: one after the other; each match is a part, and so is what lies between. keeps_words:
    a part that is a token stays whole, whatever the merges. begins: whether a text begins with BOS
    where the file does not say. normalizer: of the publisher's tokenizer.json.
    """

    patterns: tuple[str, ...]
    keeps_words: bool = False
    begins: bool = False
    normalizer: dict[str, str] | None = None


_SPLITTINGS = {
    "default": _Splitting(_DEFAULT),
    "gpt-2": _Splitting((_GPT2,)),
    "smollm": _Splitting((r"\p{N}", _GPT2)),
    "llama-bpe": _Splitting((_LLAMA_3,), keeps_words=True, begins=True),
    "qwen2": _Splitting((_QWEN_2,), normalizer={"type": "NFC"}),
    "deepseek-r1-qwen": _Splitting((_QWEN_2,)),
    "tekken": _Splitting((_TEKKEN,), keeps_words=True, begins=True),
}
_SPLITTINGS |= dict.fromkeys(("llama3", "llama-v3"), _SPLITTINGS["llama-bpe"])


class _Tokens:
    """The tokens of a file. Raises InputError where they do not fit together."""

    def __init__(self, header: Header):
        self.header = header
        self.kind = self.get("model")
        self.texts = texts = self.get("tokens")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self.wrong("tokens", "a list of texts")
        self.ids = {text: i for i, text in enumerate(texts)}
        if len(self.ids) < len(texts):
            raise self.wrong("tokens", "no text twice")
        named = map(self.id, ("bos", "eos", "eot", "eom", "padding", "unknown"))
        special = [i for i in named if i is not None]
        types = self.get("token_type")
        self.types = np.full(len(texts), _NORMAL) if types is None else types
        if types is None:
            self.types[special] = _CONTROL
        if not isinstance(self.types, np.ndarray) or len(self.types) != len(texts):
            raise self.wrong("token_type", f"a number for each of the {len(texts):,} tokens")

    def get(self, key: str) -> Any:
        return self.header.metadata.get(f"tokenizer.ggml.{key}")

    def wrong(self, key: str, expected: str) -> InputError:
        return self.header.wrong(f"tokenizer.ggml.{key}", expected)

    def id(self, name: str) -> int | None:
        """The id of a special token, None where the file names none."""
        key = f"{name}_token_id"
        found = self.get(key)
        if found is None and self.kind == "llama":
            found = _SENTENCE_PIECE_IDS.get(name)
        if found is not None and not (is_whole(found) and 0 <= found < len(self.texts)):
            raise self.wrong(key, f"an id below {len(self.texts):,}")
        return found

    def text(self, name: str) -> str | None:
        found = self.id(name)
        return None if found is None else self.texts[found]

    def splitting(self) -> _Splitting:
        name = self.get("pre")
        if not isinstance(name, str) or name not in _SPLITTINGS:
            hint = "" if name else "; convert the model with a newer llama.cpp"
            raise self.wrong("pre", f"one of {', '.join(_SPLITTINGS)}{hint}")
        return _SPLITTINGS[name]

    def adds(self, name: str) -> bool:
        """Whether texts begin with "bos", or end with "eos"."""
        key = f"add_{name}_token"
        found = self.get(key)
        if found is None:
            pre = self.get("pre")
            begins = isinstance(pre, str) and pre in _SPLITTINGS and _SPLITTINGS[pre].begins
            found = name == "bos" and (self.kind == "llama" or (self.kind == "gpt2" and begins))
        if not isinstance(found, bool):
            raise self.wrong(key, "true or false")
        return found and self.id(name) is not None


def read_tokenizer_json(header: Header) -> str | None:
    """The text of a tokenizer.json, None where the file has no tokenizer.

    Special tokens in a text are recognised, as with any tokenizer.json. Raises InputError, naming
    it, for a kind of tokenizer that is not built.
    """
    kind = header.metadata.get("tokenizer.ggml.model", "none")
    if isinstance(kind, str) and kind in ("none", "no_vocab"):
        return None
    if not isinstance(kind, str) or kind not in ("gpt2", "llama"):
        raise header.wrong("tokenizer.ggml.model", "gpt2 or llama, which are all that is built")
    tokens = _Tokens(header)
    data = _byte_level(tokens) if kind == "gpt2" else _sentence_piece(tokens)
    added = [
        {"id": int(i), "content": tokens.texts[i], "special": bool(tokens.types[i] != _USER)}
        | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i in np.flatnonzero(np.isin(tokens.types, (_UNKNOWN, _CONTROL, _USER)))
        if tokens.texts[i]
    ]
    data = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added} | data
    data["post_processor"] = _ends(tokens)
    text = json.dumps(data, ensure_ascii=False)
    try:
        tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more special
        problem = f"its tokenizer does not fit together ({first_line(error)})"
        raise InputError(f"{header.file}: {problem}; convert the model again") from None
    return text


def read_tokenizer_config(header: Header) -> dict[str, Any]:
    """The fields of tokenizer_config.json. Raises InputError for an id that is no token."""
    if "tokenizer.ggml.tokens" not in header.metadata:
        return {}
    tokens = _Tokens(header)
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    config: dict[str, Any] = {f"{key}_token": tokens.text(name) for key, name in names.items()}
    config |= {"add_bos_token": tokens.adds("bos"), "add_eos_token": tokens.adds("eos")}
    template = header.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise header.wrong("tokenizer.chat_template", "a text")
    config["chat_template"] = template
    return {key: value for key, value in config.items() if value is not None}


def read_generation_config(header: Header) -> dict[str, Any]:
    """The fields of generation_config.json; `eos_token_id` is a list where several ids end a text.

    Raises InputError for an id that is no token."""
    if "tokenizer.ggml.tokens" not in header.metadata:
        return {}
    tokens = _Tokens(header)
    ends = [i for i in map(tokens.id, ("eos", "eot", "eom")) if i is not None]
    ends = list(dict.fromkeys(ends))
    config = {
        "bos_token_id": tokens.id("bos"),
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        "pad_token_id": tokens.id("padding"),
    }
    return {key: value for key, value in config.items() if value is not None}


def _byte_level(tokens: _Tokens) -> dict[str, Any]:
    """Bytes are letters, which are merged within the parts of a text."""
    splitting, merges = tokens.splitting(), tokens.get("merges")
    if not isinstance(merges, list):
        raise tokens.wrong("merges", "a list of texts")
    pairs = []
    for merge in merges:
        space = merge.find(" ", 1)
        if space < 1:
            raise InputError(f"{tokens.header.file}: the merge {shown(merge)} is no pair of tokens")
        pairs.append((merge[:space], merge[space + 1 :]))
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in splitting.patterns
    ]
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    letters["use_regex"] = False
    model = {"ignore_merges": splitting.keeps_words, "byte_fallback": False, "fuse_unk": False}
    return {
        "normalizer": splitting.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, letters]},
        "decoder": letters,
        "model": _bpe(tokens, pairs) | model,
    }


def _sentence_piece(tokens: _Tokens) -> dict[str, Any]:
    """Pieces of text in which a space is U+2581; other letters fall back to bytes."""
    if tokens.get("precompiled_charsmap") is not None:
        raise tokens.wrong("precompiled_charsmap", "nothing: it is not built")
    begins = tokens.get("add_space_prefix")
    begins = True if begins is None else begins
    if not isinstance(begins, bool):
        raise tokens.wrong("add_space_prefix", "true or false")
    steps = [{"type": "Prepend", "prepend": "\u2581"}] if begins else []
    steps += [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if begins:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model: dict[str, Any] = {"ignore_merges": False, "byte_fallback": True, "fuse_unk": True}
    model["unk_token"] = tokens.text("unknown")
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(tokens, _piece_merges(tokens)) | model,
    }


def _piece_merges(tokens: _Tokens) -> Sequence[tuple[str, str]]:
    """All pairs of pieces that make a piece, in the order in which they are merged: by its score,
    then as in transformers' `generate_merges`. Nothing but a normal piece is made of text."""
    scores = tokens.get("scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens.texts):
        raise tokens.wrong("scores", f"a number for each of the {len(tokens.texts):,} tokens")
    if not np.isfinite(scores).all():
        raise tokens.wrong("scores", "finite numbers")
    ranks = -scores.astype(np.float64)
    merges = []
    for i in np.flatnonzero(tokens.types == _NORMAL):
        piece = tokens.texts[i]
        if len(piece) > _LONGEST_PIECE:
            raise tokens.wrong("tokens", f"pieces of at most {_LONGEST_PIECE} letters")
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            pair = tokens.ids.get(left), tokens.ids.get(right)
            if None not in pair:
                merges.append(((ranks[i], -len(left), *pair), left, right))
    return [(left, right) for _, left, right in sorted(merges)]


def _bpe(tokens: _Tokens, merges: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "vocab": tokens.ids,
        "merges": merges,
    }


def _ends(tokens: _Tokens) -> dict[str, Any] | None:
    """The post-processor that adds BOS and EOS to a text."""
    ids = {name: tokens.id(name) for name in ("bos", "eos") if tokens.adds(name)}
    named = {name: {"SpecialToken": {"id": tokens.text(name), "type_id": 0}} for name in ids}
    if not ids:
        return None

    def around(*parts: dict[str, Any]) -> list[dict[str, Any]]:
        whole = []
        for part in parts:
            whole += [named[name] for name in ("bos",) if name in named]
            whole += [part]
            whole += [named[name] for name in ("eos",) if name in named]
        return whole

    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {
        tokens.texts[i]: {"id": tokens.texts[i], "ids": [i], "tokens": [tokens.texts[i]]}
        for i in ids.values()
        if i is not None
    }
    return {
        "type": "TemplateProcessing",
        "single": around(first),
        "pair": around(first, second),
        "special_tokens": special,
    }
