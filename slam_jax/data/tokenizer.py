"""A byte-level BPE tokenizer; decoding gives back any text exactly."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from jaxtyping import Array, Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from slam_jax.errors import InputError

_SPECIALS = ("<pad>", "<bos>", "<eos>")
SMALLEST_VOCABULARY = len(_SPECIALS) + 256


# The byte of each letter of byte-level BPE: printable bytes stand for themselves. The others, in
# order, are the letters from U+0100 on. Source: Radford et al. 2019 (GPT-2).
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
BYTE_OF = {chr(byte): byte for byte in _PRINTED}
BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


def check_text(text: str, name: str) -> None:
    """Raises InputError, naming the text, if a tokenizer could not give it back as it is.

    These are texts with a special token such as "<eos>" or a lone surrogate, which is not UTF-8.
    """
    for special in _SPECIALS:
        if special in text:
            raise InputError(f"{name} holds {special!r}, which is added by itself; leave it out")
    check_unicode(text, name)


def check_unicode(text: str, name: str) -> None:
    """Raises InputError, naming the text, for a lone surrogate, which is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} has half a letter in it (a lone surrogate); remove it") from None


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A trained tokenizer, stored as the JSON of the `tokenizers` library.

    Text never encodes to a special token: a literal "<eos>" is encoded letter by letter.

    Raises:
      InputError: the JSON is not that of a tokenizer trained by this class.
    """

    json: str = dataclasses.field(repr=False)

    pad_id = 0
    bos_id = 1
    eos_id = 2
    end_ids = (2,)
    chat_template = None

    def __post_init__(self) -> None:
        if tuple(map(self._model.id_to_token, range(len(_SPECIALS)))) != _SPECIALS:
            raise InputError(
                f"tokenizer: ids 0, 1, 2 must be {', '.join(_SPECIALS)}; "
                "load one saved by slam_jax.data.Tokenizer"
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns at most `vocab_size` tokens; fewer if the texts have no more pairs to merge.

        The same texts give the same tokenizer. Raises InputError if `vocab_size` is smaller than
        the special tokens and the 256 bytes together.
        """
        if vocab_size < SMALLEST_VOCABULARY:
            raise InputError(
                f"vocab_size is {vocab_size}; the specials and the 256 bytes need at least "
                f"{SMALLEST_VOCABULARY}"
            )
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(_SPECIALS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        return cls(model.to_str())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without <bos> and <eos>."""
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text to continue: <bos>, then `text`."""
        return [self.bos_id, *self.encode(text)]

    def check(self, text: str, name: str) -> None:
        """Raises InputError, naming the text, where it would not be given back as it is."""
        check_text(text, name)

    def special_id(self, text: str) -> int | None:
        """None: no text is a special token."""
        return None

    def decode(self, ids: Sequence[int] | Int[Array | np.ndarray, "T"]) -> str:
        """The text of `ids` up to the first <eos>, without other special tokens."""
        kept: list[int] = np.asarray(ids, np.int64).tolist()
        if self.eos_id in kept:
            kept = kept[: kept.index(self.eos_id)]
        return self._model.decode(kept, skip_special_tokens=True)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of each token, empty for special tokens. Joined, they are a text in UTF-8."""
        pieces = [self._model.id_to_token(i) for i in range(self.vocab_size)]
        return [
            b"" if piece in _SPECIALS else bytes(BYTE_OF[letter] for letter in piece or "")
            for piece in pieces
        ]

    def to_bytes(self, ids: Sequence[int]) -> bytes:
        """The text of these tokens as bytes; a part of it may be no whole letter."""
        return b"".join(self.token_bytes[i] for i in ids)

    @property
    def known(self) -> None:
        """None: all ids have a token."""

    @property
    def ids_by_token(self) -> dict[str, int]:
        """The id of each token, by its text as the library stores it: special tokens and letters
        of byte-level BPE."""
        return self._model.get_vocab()

    @property
    def vocab_size(self) -> int:
        return self._model.get_vocab_size()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    def to_json(self) -> str:
        return self.json

    @classmethod
    def from_json(cls, json: str) -> "Tokenizer":
        return cls(json)

    def save(self, path: str | pathlib.Path) -> None:
        pathlib.Path(path).write_text(self.json, encoding="utf-8")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Tokenizer":
        return cls(pathlib.Path(path).read_text(encoding="utf-8"))

    @functools.cached_property
    def _model(self) -> tokenizers.Tokenizer:
        try:
            model = tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises the bare type
            raise InputError(
                f"tokenizer: not a tokenizer's JSON ({error}); "
                "give the text that Tokenizer.save wrote"
            ) from error
        # Not part of the JSON: without it a user's literal "<eos>" would become the special token.
        model.encode_special_tokens = True
        model.no_truncation()  # as in `hub_files.parse_tokenizer`
        model.no_padding()
        return model
