"""Constraints on the form of an answer: a list of choices, a regular expression, a JSON schema.

The tokens that may come next are computed by llguidance (the extra `constraints`): those whose
bytes, after the answer so far, begin a text of the required form. A text may be cut into tokens in
any way. Patterns and schemas may come from strangers: they have a largest size, and are compiled in
a process with limits before they are compiled in this one. No reference is fetched.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from slam_jax.data.tokenizer import check_unicode
from slam_jax.errors import InputError, shorten

_WORKER = Path(__file__).with_name("grammar_worker.py")
_WAIT = 20  # seconds on a busy machine, for what takes 2 of computing
_LONGEST = 1 << 16  # characters of a schema, or of all choices together
_LONGEST_PATTERN = 4_000
_MOST_CHOICES = 1_000
# Bytes of a token. Longer ones, such as a line of 500 signs, are never chosen within a constraint.
_LONGEST_TOKEN = 255
_NOTHING = "NoExtension"  # how messages of llguidance begin where nothing can follow
# The form of json.dumps: a model cannot go on with spaces forever.
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@runtime_checkable
class Constraint(Protocol):
    """What the answer of one sample may be, and how far it is."""

    def copy(self) -> "Constraint":
        """A constraint in the same state, which then goes its own way."""
        ...

    def allowed(self) -> Bool[np.ndarray, "V"]:
        """The tokens that may come next, of all rows of the model's vocabulary; at least one.

        End tokens are among them where the answer may end.

        Raises InputError where no token can come next, or the answer has ended.
        """
        ...

    def advance(self, token: int) -> None:
        """The token that was chosen, also if it is an end. Raises InputError unless allowed."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing can follow but an end."""
        ...


def choices(loaded: Any, texts: Sequence[str]) -> Constraint:
    """The answer is exactly one of the texts.

    loaded: a model with its tokenizer, as `slam_jax.load` returns.

    Raises InputError for anything but 1 to 1,000 texts of 65,536 characters together.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise InputError("choices: expected a list of at least one text")
    for text in texts:
        _check_text("choices", text, _LONGEST)
    if len(texts) > _MOST_CHOICES or sum(map(len, texts)) > _LONGEST:
        raise InputError(f"choices: at most {_MOST_CHOICES:,} texts of {_LONGEST:,} characters")
    strings = " | ".join(json.dumps(text) for text in dict.fromkeys(texts))
    return _constrain(loaded, "choices", f"BODY: {strings}")


def regex(loaded: Any, pattern: str) -> Constraint:
    """The answer as a whole matches the pattern.

    pattern: in the syntax of Rust's `regex` crate, most of which is that of Python's `re`; `\\d`,
      `\\w` and `\\s` are those of ASCII. It has no look-around, back references and `\\b`. `^` and
      `$` may be at its ends, and change nothing.

    Raises InputError where the pattern is wrong, of more than 4,000 characters, matches no text, or
    would take too much time or memory.
    """
    _check_text("regex", pattern, _LONGEST_PATTERN)
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise InputError("regex: the pattern ends within an escape; write \\\\ for a backslash")
    escaped = _library().regex_to_lark(pattern, "dws")
    body = f"BODY: /{escaped}/" if pattern else 'BODY: ""'
    return _constrain(loaded, "regex", body)


def json_schema(loaded: Any, schema: str | dict[str, Any]) -> Constraint:
    """The answer is JSON that is valid by the schema, in one line as `json.dumps` writes it.

    Properties come in the order of the schema. What llguidance cannot enforce is refused, such as
    `not`, and `oneOf` where two of its schemas may both hold.

    Raises InputError where the schema is wrong, not supported, larger than 65,536 characters of
    JSON, refers to another document, or would take too much time or memory.
    """
    if isinstance(schema, str):
        _check_text("json_schema", schema, _LONGEST)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InputError(f"json_schema: not JSON ({shorten(str(error), 100)})") from None
    if not isinstance(schema, dict):
        raise InputError(f"json_schema is a {type(schema).__name__}; expected an object")
    try:
        text = json.dumps({**schema, "x-guidance": _JSON_FORM}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"json_schema: not JSON ({shorten(str(error), 100)})") from None
    _check_text("json_schema", text, _LONGEST)
    return _constrain(loaded, "json_schema", "body: @schema", {"json_schema": json.loads(text)})


class _Matching:
    """A `Constraint` by a matcher of llguidance, whose end token is one beyond the vocabulary."""

    def __init__(self, matcher: Any, name: str, end_ids: Sequence[int], num_rows: int):
        self._matcher, self._name = matcher, name
        self._end_ids, self._num_rows = list(end_ids), num_rows
        self._allowed: Any = None

    def copy(self) -> "_Matching":
        return _Matching(self._matcher.deep_copy(), self._name, self._end_ids, self._num_rows)

    def allowed(self) -> Bool[np.ndarray, "V"]:
        if self._allowed is None:
            words = np.zeros(self._num_rows // 32 + 1, np.uint32)
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            self._check()
            bits = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")
            allowed = bits[: self._num_rows].astype(bool)
            allowed[self._end_ids] = bits[self._num_rows]
            if not allowed.any():
                raise InputError(f"{self._name}: the answer has ended")
            self._allowed = allowed
        return self._allowed

    def advance(self, token: int) -> None:
        self._allowed = None
        self._matcher.consume_token(self._num_rows if token in self._end_ids else token)
        self._check()

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            error = self._matcher.get_error()
            if error.startswith(_NOTHING):
                raise InputError(f"{self._name}: no token of this model can come next")
            raise InputError(f"{self._name}: {_reason(error)}; give a simpler one")


def _check_text(name: str, text: Any, longest: int) -> None:
    if not isinstance(text, str):
        raise InputError(f"{name}: expected a text, and there is a {type(text).__name__}")
    check_unicode(text, name)
    if len(text) > longest:
        raise InputError(f"{name} of {len(text):,} characters; at most {longest:,}")


def _constrain(loaded: Any, name: str, body: str, *others: dict[str, Any]) -> Constraint:
    """A constraint by a rule BODY, or body, in the Lark syntax of llguidance."""
    tokenizer, num_rows = loaded.tokenizer, loaded.model.config.vocab_size
    # A tokenizer may strip spaces from the start of a text; the answer begins with as many.
    spaces = " " * getattr(tokenizer, "stripped_spaces", 0)
    start = f"start: {json.dumps(spaces) if spaces else ''} {body.partition(':')[0]}"
    # Without `no_forcing` only one way to cut the text would be allowed where it is certain.
    lark = "\n".join(['%llguidance {"no_forcing": true}', start, body])
    schemas = [{"name": "schema", **other} for other in others]
    grammar = json.dumps({"grammars": [{"lark_grammar": lark}, *schemas]})
    matcher = _compiled(tokenizer, num_rows, name, grammar).deep_copy()
    return _Matching(matcher, name, tokenizer.end_ids, num_rows)


@functools.lru_cache(maxsize=16)
def _compiled(tokenizer: Any, num_rows: int, name: str, grammar: str) -> Any:
    """The matcher of a grammar, at the start of a text."""
    if reason := _why_not(grammar):
        raise InputError(f"{name}: {reason}")
    from slam_jax.serving.grammar_worker import limits

    vocabulary = _vocabulary(tokenizer, num_rows)
    return _library().LLMatcher(vocabulary, grammar, log_level=0, limits=limits())


def _why_not(grammar: str) -> str | None:
    """Why a grammar cannot be compiled. None: it can, within the limits."""
    _library()
    # -P: the folder of the script is not searched for modules.
    command = [sys.executable, "-P", str(_WORKER)]
    try:
        done = subprocess.run(
            command, input=grammar.encode(), capture_output=True, timeout=_WAIT, check=False
        )
    except subprocess.TimeoutExpired:
        return "it takes too much time; give a simpler one"
    if done.returncode:
        return "it takes too much memory or time; give a simpler one"
    error = done.stdout.decode("utf-8", "replace")
    return _reason(error) if error else None


def _reason(error: str) -> str:
    """The part of a message of llguidance, which has several lines, that says what is wrong."""
    if error.startswith(_NOTHING):
        return "no text has this form"
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    of_pattern = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    line = (of_pattern or lines or ["it cannot be used"])[0]
    return shorten(line.rpartition("(in regex): ")[2], 200)


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any, num_rows: int) -> Any:
    """The bytes of each row of the model's vocabulary, and after them the end."""
    return _library().LLTokenizer(_Pieces(tokenizer, num_rows))


class _Pieces:
    """What llguidance reads of a tokenizer. Tokens without bytes are never chosen."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Any, num_rows: int):
        pieces = [b"" if len(x) > _LONGEST_TOKEN else x for x in tokenizer.token_bytes]
        self.tokens = [*pieces, *[b""] * (num_rows - len(pieces)), b"<end>"]
        self.eos_token_id = num_rows
        self.special_token_ids = [num_rows]

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("no text is encoded, since none is forced")


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise InputError(
            "constraints need llguidance; install it with: pip install 'slam_jax[constraints]'"
        ) from None
    return llguidance
