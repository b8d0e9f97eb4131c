"""The texts of a run as rows of tokens, with their tokenizer."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from slam_jax.data.hub_tokenizer import AnyTokenizer
from slam_jax.data.packing import Encoded, TextRows, encode_text
from slam_jax.data.records import DataError
from slam_jax.data.texts import SPLITS, Text, TextDataConfig, Texts, read_own_texts
from slam_jax.data.tokenizer import Tokenizer
from slam_jax.errors import ConfigError, InputError, require


@dataclasses.dataclass(frozen=True)
class TextDataset:
    """Rows by split, and their tokenizer.

    all: of every text once. has_answers: whether texts are answers to prompts. longest_answer: in
    tokens, the end included. notes: what the user should know.
    """

    splits: dict[str, TextRows]
    tokenizer: AnyTokenizer
    has_answers: bool
    longest_answer: int
    place: str
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the data: the sha256 of the training tokens, and the rows by split."""
        digest = hashlib.sha256()
        for text in self.splits["train"].texts:
            digest.update(f"{len(text.ids)} {text.first} ".encode())
            digest.update(text.ids.tobytes())
        rows = {name: len(self.splits[name]) for name in SPLITS}
        return {"sha256": digest.hexdigest(), "rows": rows}


def open_texts(
    config: TextDataConfig, tokenizer: AnyTokenizer | None = None, *, can_pack: bool = True
) -> TextDataset:
    """The texts of a configuration as rows.

    tokenizer: None = a new one, which learns from the training split. can_pack: whether the model
    takes rows of several texts.

    Raises:
      ConfigError: a field does not fit the tokenizer or the model.
      DataError: the texts cannot be read, or too many of them do not fit into a row.
    """
    texts = read_own_texts(config)
    if tokenizer is None:
        parts = (part for each in texts.splits["train"] for part in (each.prompt, each.text))
        tokenizer = Tokenizer.train((part for part in parts if part), config.vocab_size)
    chat = config.chat
    if chat is None:
        chat = tokenizer.chat_template is not None
    elif chat:
        there = tokenizer.chat_template is not None
        require(there, "data.chat", True, "False: the tokenizer has no chat template")
    if texts.have_answers and tokenizer.eos_id is None:
        raise ConfigError("the tokenizer has no end token, which answers have to end with")
    packed = can_pack if config.pack is None else config.pack
    require(can_pack or not packed, "data.pack", True, "False: this model reads one text a row")
    encoded = _encode(texts, tokenizer, config, chat)
    splits = {
        name: TextRows.of(each, config.length, packed=packed, pad_id=tokenizer.pad_id)
        for name, each in encoded.items()
    }
    answers = [len(x.ids) - x.first for x in encoded["all"]] if texts.have_answers else [0]
    for note in texts.notes:
        logging.getLogger("slam_jax").warning("%s: %s", texts.place, note)
    parts = texts.have_answers, max(answers), texts.place, texts.notes
    return TextDataset(splits, tokenizer, *parts)


def _encode(
    texts: Texts, tokenizer: AnyTokenizer, config: TextDataConfig, chat: bool
) -> dict[str, list[Encoded]]:
    """The tokens of the texts of each split that fit, and of all of them."""
    known: dict[int, Encoded | None] = {}
    bad: list[str] = []

    def encoded(each: Text) -> Encoded | None:
        if id(each) not in known:
            try:
                known[id(each)] = _encode_one(each, tokenizer, config.length, chat)
            except InputError as error:
                known[id(each)] = None
                bad.append(f"{each.where}: {error}")
        return known[id(each)]

    def fitting(given: Sequence[Text]) -> list[Encoded]:
        return [x for x in map(encoded, given) if x is not None]

    found = {name: fitting(texts.splits[name]) for name in SPLITS}
    alone = {id(each): each for each in texts.all}  # with held_out=0 the splits are the same texts
    found["all"] = fitting(list(alone.values()))
    if len(bad) > config.max_damaged_records:
        more = f" (and {len(bad) - 1} more such)" if len(bad) > 1 else ""
        raise DataError(
            f"{bad[0]}{more}; correct it, or let data.max_damaged_records={len(bad)} be skipped"
        )
    for each in bad:
        logging.getLogger("slam_jax").warning("%s (skipped)", each)
    for name, each in found.items():
        if not any(len(x.ids) > 1 for x in each):
            raise DataError(f"{texts.place}: no text is left for {name}; give more or longer ones")
    return found


def _encode_one(text: Text, tokenizer: AnyTokenizer, length: int, chat: bool) -> Encoded:
    encoded = encode_text(tokenizer, text, chat=chat)
    if text.prompt is not None and len(encoded.ids) > length + 1:
        raise InputError(
            f"prompt and answer have {len(encoded.ids):,} tokens; data.length={length:,} allows "
            f"{length + 1:,}"
        )
    return encoded._replace(ids=np.asarray(encoded.ids, np.int32))
