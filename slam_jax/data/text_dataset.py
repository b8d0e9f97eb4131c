"""The texts of a run as rows of tokens, with their tokenizer."""

import dataclasses
import functools
import hashlib
import logging
from typing import Any

from slam_jax.data.hub_tokenizer import AnyTokenizer
from slam_jax.data.packing import Encoded, TextRows, encode_texts
from slam_jax.data.records import DataError
from slam_jax.data.texts import SPLITS, TextDataConfig, Texts, read_own_texts
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
    alone = {id(each): each for each in texts.all}  # with held_out=0 the splits are the same texts
    known: dict[int, Encoded] = {}
    bad: list[str] = []
    each_encoded = encode_texts(tokenizer, list(alone.values()), chat=chat)
    for (key, text), encoded in zip(alone.items(), each_encoded, strict=True):
        problem = encoded if isinstance(encoded, InputError) else None
        if isinstance(encoded, Encoded):
            size = len(encoded.ids)
            if text.prompt is None or size <= config.length + 1:
                known[key] = encoded
                continue
            problem = (
                f"prompt and answer have {size:,} tokens; data.length={config.length:,} allows "
                f"{config.length + 1:,}"
            )
        bad.append(f"{text.where}: {problem}")
    splits = {**texts.splits, "all": list(alone.values())}
    found = {
        name: [known[id(each)] for each in given if id(each) in known]
        for name, given in splits.items()
    }
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
