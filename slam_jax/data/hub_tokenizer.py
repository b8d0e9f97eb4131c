"""Tokenizers of published models, with their special tokens and chat templates."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Array, Bool, Int

from slam_jax.data.chat import check_messages, render_chat, render_chats
from slam_jax.data.hub_files import (
    CONFIG,
    FILE,
    GENERATION,
    IDS,
    NAMES,
    parse_group,
    parse_tokenizer,
    read_files,
    read_ids,
    read_template,
    read_token,
    sentence_piece,
)
from slam_jax.data.tokenizer import BYTE_OF, Tokenizer, check_unicode
from slam_jax.errors import InputError, first_line, is_whole, shorten

_MARK = "slam_jax_hub_tokenizer"
_KINDS: Mapping[str, tuple[Any, str]] = {
    "json": (str, "a text"),
    "end_ids": (list, "a list of token ids"),
    "adds_bos": (bool | None, "true, false or null"),
    "chat_template": (str | None, "a text or null"),
    "special_tokens": (dict, "texts by name"),
    "generation": (dict, "a group of fields"),
}
_DEEPEST = 32  # groups in the content of a message


@dataclasses.dataclass(frozen=True)
class HubTokenizer:
    """A tokenizer.json of the hub, and what the files beside it say.

    json: its text. end_ids: the tokens that end an answer; () = none does. bos_id: the first token
    of a text. adds_bos: whether a prompt begins with it; None = as the JSON says.
    eos_id: the end of an answer that is given; one of end_ids, None without any. pad_id: fills
    shorter rows; any token will do. chat_template: a Jinja template. special_tokens: texts by name,
    such as "bos_token", for the template. generation: the other fields of
    generation_config.json.

    Raises:
      InputError: the JSON is not that of a tokenizer, or an id is not in its vocabulary.
    """

    json: str = dataclasses.field(repr=False)
    end_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    adds_bos: bool | None = None
    eos_id: int | None = None
    pad_id: int = 0
    chat_template: str | None = dataclasses.field(default=None, repr=False)
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        ends = (int(each) if is_whole(each) else each for each in self.end_ids)
        object.__setattr__(self, "end_ids", tuple(ends))
        if self.eos_id is None and self.end_ids:
            object.__setattr__(self, "eos_id", self.end_ids[0])
        size = self.vocab_size
        for name in ("end_ids", "bos_id", "eos_id", "pad_id"):
            ids = getattr(self, name)
            for each in ids if isinstance(ids, tuple) else [ids]:
                if each is not None and (not is_whole(each) or not 0 <= each < size):
                    expected = f"a token of the {size:,} that the tokenizer has"
                    raise InputError(f"tokenizer: {name} is {each!r}; expected {expected}")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` alone; a literal special token is encoded letter by letter."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to continue, as its publisher's library makes them.

        A literal special token is that token. A token before the text, such as a BOS, is added if
        the tokenizer has such a rule; an end after the text is not. An empty text without such a
        rule is one token, the BOS or, without one, the end.
        """
        if self.adds_bos is None:
            ids = self._model.encode(text).ids
            with_end = ids and ids[-1] == self.eos_id and not text.endswith(self._text_of(ids[-1]))
            ids = ids[:-1] if with_end else ids
        else:
            ids = self._model.encode(text, add_special_tokens=False).ids
            ids = [self.bos_id, *ids] if self.adds_bos and self.bos_id is not None else ids
        return ids or self._first()

    def encode_chat(self, messages: Any, **variables: Any) -> list[int]:
        """Token ids of a conversation, up to where the next answer begins; see `chat_text`."""
        return self._encode_chat(self.chat_text(messages, **variables))

    def encode_chats(
        self, conversations: Sequence[Any], *, date: str | None = None
    ) -> list[list[int] | InputError]:
        """`encode_chat` of each conversation, in a few processes for all; or why it has no tokens.

        date: what the template writes as today, such as "2024-07-26"; None = the date of today.

        Raises InputError where there is no template, or it cannot be used at all.
        """
        found: list[list[int] | InputError | None] = []
        for messages in conversations:
            try:
                self._check_chat(messages)
                found.append(None)
            except InputError as error:
                found.append(error)
        fine = [x for x, problem in zip(conversations, found, strict=True) if problem is None]
        template, names = self.chat_template or "", dict(self.special_tokens)
        texts = iter(render_chats(template, fine, variables=names, date=date))
        rendered = [next(texts) if each is None else each for each in found]
        return [self._encode_chat(x) if isinstance(x, str) else x for x in rendered]

    def _encode_chat(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids or self._first()

    def chat_text(self, messages: Any, **variables: Any) -> str:
        """The conversation as the chat template writes it; see `render_chat`.

        Raises InputError where there is no template, or a message has a special token in it: the
        model could not tell it from the end of the message.
        """
        self._check_chat(messages)
        variables = {**self.special_tokens, **variables}
        return render_chat(self.chat_template or "", messages, variables=variables)

    def _check_chat(self, messages: Any) -> None:
        if self.chat_template is None:
            raise InputError("this model has no chat template; give it a prompt")
        check_messages(messages)
        for i, message in enumerate(messages):
            self._check_content(message, f"message {i}")

    def check(self, text: str, name: str) -> None:
        """Raises InputError, naming the text, where it is not Unicode."""
        check_unicode(text, name)

    def special_id(self, text: str) -> int | None:
        """The special token that this text is, or None."""
        return self._model.token_to_id(text) if text in self._special_texts else None

    def decode(self, ids: Sequence[int] | Int[Array | np.ndarray, "T"]) -> str:
        """The text of `ids` up to the first end, without special tokens; ids that the tokenizer
        does not have are the replacement character."""
        kept = []
        for each in np.asarray(ids, np.int64).tolist():
            if each in self.end_ids:
                break
            kept.append(each)
        return self.to_bytes(kept).decode("utf-8", "replace")

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        """The text of these tokens as bytes; a part of it may be no whole letter."""
        pieces, unknown = self.token_bytes, "\ufffd".encode()
        text = b"".join(pieces[i] if 0 <= i < len(pieces) else unknown for i in ids)
        start = self.stripped_spaces
        return text[min(start, len(text) - len(text.lstrip(b" "))) :]

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token, empty for special tokens."""
        added = self._model.get_added_tokens_decoder()
        to_bytes = self._bytes_of_piece
        pieces = []
        for i in range(self.vocab_size):
            if i in added:
                pieces.append(b"" if added[i].special else added[i].content.encode())
            else:
                piece = self._model.id_to_token(i)
                pieces.append(b"" if piece is None else to_bytes(piece))
        return pieces

    @property
    def ids_by_token(self) -> dict[str, int]:
        """The id of each piece of the vocabulary."""
        return self._model.get_vocab(with_added_tokens=True)

    @functools.cached_property
    def known(self) -> Bool[np.ndarray, "V"]:
        """Which ids have a token; some vocabularies have gaps."""
        return np.array([self._model.id_to_token(i) is not None for i in range(self.vocab_size)])

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest id, and one more."""
        return 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """All of it as one text; see `from_json`."""
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        fields |= {name: dict(fields[name]) for name in ("special_tokens", "generation")}
        return json.dumps({_MARK: 1, **fields})

    @classmethod
    def from_json(cls, text: str) -> "HubTokenizer":
        """The inverse of `to_json`. Raises InputError for another text."""
        data = parse_group(text, "tokenizer")
        if data.pop(_MARK, None) != 1:
            raise InputError("tokenizer: not the text that HubTokenizer.to_json returned")
        for name, (kind, expected) in _KINDS.items():
            if name in data and not isinstance(data[name], kind):
                shown = shorten(repr(data[name]), 60)
                raise InputError(f"tokenizer: {name} is {shown}; expected {expected}")
        specials = data.get("special_tokens", {})
        data["special_tokens"] = {n: each for n in specials if (each := read_token(specials, n))}
        read_template(data.get("chat_template"))
        try:
            return cls(**data)
        except TypeError as error:
            raise InputError(f"tokenizer: {first_line(error)}") from None

    def to_files(self) -> dict[str, str]:
        """The files of the hub that `load` reads, by name."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= self.special_tokens
        if self.adds_bos is not None:
            config["add_bos_token"] = self.adds_bos
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        ends = self.end_ids[0] if len(self.end_ids) == 1 else list(self.end_ids)
        ids = {"bos_token_id": self.bos_id, "eos_token_id": ends or None}
        generation = {**self.generation, **{k: v for k, v in ids.items() if v is not None}}
        texts = {CONFIG: config, GENERATION: {**generation, "pad_token_id": self.pad_id}}
        return {FILE: self.json, **{k: json.dumps(v, indent=2) + "\n" for k, v in texts.items()}}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "HubTokenizer":
        """Our own tokenizer in the form of the hub."""
        names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        ids: Any = dict(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        return cls(tokenizer.json, tokenizer.end_ids, adds_bos=True, special_tokens=names, **ids)

    @classmethod
    def is_json(cls, text: str) -> bool:
        """Whether a text is that of `to_json`."""
        return text.lstrip().startswith(f'{{"{_MARK}"')

    @classmethod
    def load(cls, folder: str | Path) -> "HubTokenizer":
        """The tokenizer of a folder from the hub, or of a tokenizer.json with what is beside it.

        Ends are those of generation_config.json, else of config.json, else the tokenizer's own.
        """
        files = read_files(folder)
        known = {key: value for key, value in files.ids.items() if key not in files.generation}
        found = cls.from_files(files.text, files.config, {**files.generation, **known})
        others = {key: value for key, value in files.generation.items() if key not in IDS}
        return dataclasses.replace(found, generation=others)

    @classmethod
    def from_files(
        cls, text: str, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> "HubTokenizer":
        """From the contents of tokenizer.json, tokenizer_config.json and generation_config.json.

        Raises InputError, naming the field.
        """
        model, names = parse_tokenizer(text), ("bos_token", "eos_token", "pad_token")
        tokens = {name: read_token(config, name) for name in names}
        bos, end, pad = (None if t is None else model.token_to_id(t) for t in tokens.values())
        if bos is None:
            bos = next(iter(read_ids(generation, "bos_token_id")), None)
        ends = read_ids(generation, "eos_token_id") or ((end,) if end is not None else ())
        eos = end if end in ends else next(iter(ends), None)
        adds_bos = config.get("add_bos_token")
        return cls(
            text,
            ends,
            bos_id=bos,
            adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
            eos_id=eos,
            pad_id=next(x for x in (pad, eos, 0) if x is not None),
            chat_template=read_template(config.get("chat_template")),
            special_tokens={n: t for n in NAMES if (t := read_token(config, n)) is not None},
        )

    def _first(self) -> list[int]:
        """What an empty text begins with: a model needs a token to continue."""
        ids = (self.bos_id, self.eos_id, self.pad_id)
        return [next(each for each in ids if each is not None)]

    def _check_content(self, value: Any, name: str, depth: int = 0) -> None:
        """Refuses special tokens in texts, however deep in a message they are."""
        if depth > _DEEPEST:
            raise InputError(f"{name} has groups inside of {_DEEPEST} others; make it flatter")
        if isinstance(value, str):
            check_unicode(value, name)
            for special in self._special_texts:
                if special in value:
                    raise InputError(f"{name} holds {special!r}, which the template adds itself")
        elif isinstance(value, Mapping):
            for each in value.values():
                self._check_content(each, name, depth + 1)
        elif isinstance(value, (list, tuple)):
            for each in value:
                self._check_content(each, name, depth + 1)

    @functools.cached_property
    def _special_texts(self) -> list[str]:
        added = self._model.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special and token.content]

    def _text_of(self, token: int) -> str:
        return self._model.id_to_token(token) or ""

    @functools.cached_property
    def _model(self) -> tokenizers.Tokenizer:
        return parse_tokenizer(self.json)

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same, for which a literal special token is a text like any other."""
        model = parse_tokenizer(self.json)
        model.encode_special_tokens = True
        return model

    @functools.cached_property
    def _decoders(self) -> list[Mapping[str, Any]]:
        """The steps of the JSON's decoder."""
        decoder = parse_group(self.json, "tokenizer").get("decoder") or {}
        return decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]

    @functools.cached_property
    def stripped_spaces(self) -> int:
        """How many spaces at the start of a text are not part of it."""
        for step in self._decoders:
            if step.get("type") == "Strip" and step.get("content") == " ":
                return int(step.get("start", 0))
            if step.get("type") == "Metaspace":
                return int(step.get("prepend_scheme", "always") != "never")
        return 0

    @functools.cached_property
    def _bytes_of_piece(self) -> Any:
        """From a piece of the vocabulary to its bytes, as the decoder says."""
        steps = {step.get("type") for step in self._decoders}
        if "ByteLevel" in steps:
            return lambda piece: bytes(BYTE_OF.get(letter, 0) for letter in piece)
        if steps & {"Metaspace", "ByteFallback"}:
            return sentence_piece
        raise InputError(
            "tokenizer: expected byte-level BPE or SentencePiece, and its decoder is "
            f"{shorten(str(sorted(map(str, steps))), 80)}"
        )


AnyTokenizer = Tokenizer | HubTokenizer


def load_tokenizer(path: str | Path) -> HubTokenizer:
    """The tokenizer of a published model: of its folder, or inside its GGUF file.

    Raises InputError where there is none, or it cannot be read.
    """
    if str(path).endswith(".gguf"):
        from slam_jax.interop.gguf import GGUF  # it reads tokenizers of other kinds alone

        file = GGUF(path)
        if file.tokenizer_json is None:
            raise InputError(f"{path}: it has no tokenizer")
        return HubTokenizer.from_files(
            file.tokenizer_json, file.tokenizer_config, file.generation_config
        )
    return HubTokenizer.load(path)


def tokenizer_from_json(text: str) -> AnyTokenizer:
    """A tokenizer from the text that its `to_json` returned. Raises InputError for another."""
    return HubTokenizer.from_json(text) if HubTokenizer.is_json(text) else Tokenizer.from_json(text)


def as_tokenizer(given: Any) -> Any:
    """A tokenizer of this library, from anything that is one.

    given: one of ours, which is returned; a folder or a tokenizer.json; a `tokenizers.Tokenizer`; a
    fast tokenizer of transformers. Raises InputError for anything else.
    """
    if hasattr(given, "encode_prompt"):
        return given
    if isinstance(given, (str, Path)):
        return load_tokenizer(given)
    if isinstance(given, tokenizers.Tokenizer):
        return HubTokenizer(given.to_str())
    backend = getattr(given, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        ids = {n: getattr(given, f"{n}_token_id", None) for n in ("bos", "eos", "pad")}
        names = {n: t for n in NAMES if isinstance(t := getattr(given, n, None), str)}
        return HubTokenizer(
            backend.to_str(),
            () if ids["eos"] is None else (ids["eos"],),
            bos_id=ids["bos"],
            pad_id=next(x for x in (ids["pad"], ids["eos"], 0) if x is not None),
            chat_template=read_template(getattr(given, "chat_template", None)),
            special_tokens=names,
        )
    raise InputError(
        f"tokenizer is a {type(given).__name__}; expected a tokenizer, a folder of the hub, or its "
        "tokenizer.json"
    )
