"""Answers of a required form: every allowed token, and no other, by brute force and by sampling."""

import contextlib
import json
import re
import types
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hub_tokenizer import byte_level, sentence_piece

from slam_jax.data import HubTokenizer, Tokenizer
from slam_jax.errors import InputError
from slam_jax.serving import constraints
from slam_jax.serving.constraints import choices, json_schema, regex

EXTRA_ROWS = 5  # of the model, beyond its tokenizer


def loaded(tokenizer: Any) -> Any:
    """What constraints read of a model."""
    config = types.SimpleNamespace(vocab_size=tokenizer.vocab_size + EXTRA_ROWS)
    return types.SimpleNamespace(tokenizer=tokenizer, model=types.SimpleNamespace(config=config))


BYTES = loaded(Tokenizer.train(["the cat sat on the mat, the cats"] * 3, 280))
# Two ends, and special tokens that end nothing.
SEVERAL_ENDS = loaded(HubTokenizer(byte_level(bos=True).to_str(), end_ids=(1, 2), bos_id=0))
# Strips one space from the start of a text, and has two ways to write most letters.
STRIPS = loaded(HubTokenizer(sentence_piece().to_str(), end_ids=(2,), bos_id=1))
QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@contextlib.contextmanager
def in_process() -> Iterator[None]:
    """Harmless patterns are compiled without the process that tries them first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constraints, "_why_not", lambda grammar: None)
        yield


def walk(model: Any, constraint: Any, rng: Any, most: int = 400, check: Any = None) -> str | None:
    """The text of a model to which all tokens are equally probable; None if it does not end."""
    constraint, ids = constraint.copy(), []
    while not constraint.finished:
        allowed = constraint.allowed()
        if check is not None:
            check(ids, allowed)
        token = int(rng.choice(np.flatnonzero(allowed)))
        constraint.advance(token)
        if token in model.tokenizer.end_ids:
            break
        ids.append(token)
        if len(ids) == most:
            return None
    # An undecodable text raises.
    return model.tokenizer.to_bytes(ids).decode()


@pytest.mark.parametrize("model", [BYTES, SEVERAL_ENDS, STRIPS])
def test_allowed_tokens_are_those_that_begin_a_choice(model):
    """Across the tokens' own borders, in any cut, with ends, gaps and rows that are no tokens."""
    texts = ["the cat", "the cats sat", "the", "café 日本", "\U0001f642", " a", 'a"\\\n', "<eos>"]
    with in_process():
        constraint, tokenizer = choices(model, texts), model.tokenizer
    stripped = b" " * (model is STRIPS)
    whole = [stripped + text.encode() for text in texts]

    def check(ids: list[int], allowed: np.ndarray) -> None:
        text = b"".join(tokenizer.token_bytes[i] for i in ids)
        pieces = [b"" if i in tokenizer.end_ids else x for i, x in enumerate(tokenizer.token_bytes)]
        expected = [x != b"" and any(w.startswith(text + x) for w in whole) for x in pieces]
        for end in tokenizer.end_ids:
            expected[end] = text in whole
        np.testing.assert_array_equal(allowed, expected + [False] * EXTRA_ROWS)

    rng = np.random.default_rng(0)
    found = [walk(model, constraint, rng, check=check) for _ in range(40)]
    assert set(found) <= set(texts) and len(set(found)) >= 6


def test_copies_go_their_own_way_and_ends_are_checked():
    constraint = choices(BYTES, ["ab", "ac"])
    tokens = BYTES.tokenizer.token_bytes
    a, b, c = (tokens.index(x) for x in (b"a", b"b", b"c"))
    constraint.advance(a)
    other = constraint.copy()
    constraint.advance(b)
    assert constraint.finished and not other.finished
    with pytest.raises(InputError, match="choices: "):
        constraint.advance(b)
    assert other.allowed()[[b, c]].all() and other.allowed().sum() == 2
    other.advance(c)
    assert np.flatnonzero(other.allowed()).tolist() == [BYTES.tokenizer.eos_id]
    other.advance(BYTES.tokenizer.eos_id)
    assert other.finished


LETTERS = st.sampled_from(["a", "b", "the", " ", "0", "é", "日", "\U0001f642", r"\.", r"\n", "/"])
CLASSES = st.sampled_from(
    ["[ab]", "[^a-y]", r"\d", ".", r"\W", r"\s", r"[à-ü\d]", r"[^\W]", "(?i:z)"]
)
COUNTS = st.sampled_from(["?", "*", "+", "{2}", "{0,3}", "{1,2}"])
PATTERNS = st.recursive(
    LETTERS | CLASSES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, COUNTS).map(lambda pair: f"({pair[0]}){pair[1]}"),
    ),
    max_leaves=8,
)


@QUICK
@given(PATTERNS, st.integers(0, 2**32 - 1))
def test_texts_match_their_pattern(pattern, seed):
    for model in (BYTES, STRIPS):
        with in_process():
            constraint = regex(model, pattern)
        text = walk(model, constraint, np.random.default_rng(seed))
        assert text is None or re.fullmatch(pattern, text, re.ASCII)


SCHEMAS = st.recursive(
    st.one_of(
        st.fixed_dictionaries({"type": st.just("string"), "maxLength": st.integers(0, 4)}),
        st.fixed_dictionaries(
            {"type": st.just("integer"), "minimum": st.integers(-9, 0), "maximum": st.just(120)}
        ),
        st.sampled_from([{"type": "boolean"}, {"type": "number", "minimum": 0, "maximum": 2}]),
        st.sampled_from([{"const": None}, {"type": "string", "pattern": "^(the )+cat$"}]),
        st.lists(st.sampled_from(["red", 'q"', 1, None]), min_size=1).map(lambda x: {"enum": x}),
    ),
    lambda inner: st.one_of(
        st.builds(lambda x: {"type": "array", "items": x, "maxItems": 2}, inner),
        st.builds(lambda *x: {"anyOf": list(x)}, inner, inner),
        st.builds(
            lambda x, y, given: {
                "type": "object",
                "properties": {"a": x, "b/ü": y},
                "required": given,
                "additionalProperties": False,
            },
            *(inner, inner, st.sampled_from([[], ["a"], ["b/ü", "a"]])),
        ),
    ),
    max_leaves=6,
)


@QUICK
@given(SCHEMAS, st.integers(0, 2**32 - 1))
def test_texts_are_valid_by_their_schema(schema, seed):
    with in_process():
        constraint = json_schema(SEVERAL_ENDS, schema)
    text = walk(SEVERAL_ENDS, constraint, np.random.default_rng(seed))
    if text is not None:
        value = json.loads(text)
        jsonschema.validate(value, schema)
        # The form of json.dumps; it has other ways to write some numbers and letters.
        assert re.sub(r'"(\\.|[^"\\])*"', "", text).count("  ") == 0 and "\n" not in text


def hostile_intersections() -> dict[str, Any]:
    return {"type": "string", "allOf": [{"pattern": f"(.*{i}.{{9}})"} for i in range(30)]}


def hostile_references(count: int) -> dict[str, Any]:
    """Each refers to the next, so that a parser's stack grows."""
    one = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {}]} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**one, f"d{count}": {"type": "object"}}}


HOSTILE: dict[str, tuple[Any, Any, str]] = {
    "no texts": (choices, [], "at least one text"),
    "one text": (choices, "abc", "at least one text"),
    "many": (choices, [str(i) for i in range(2_000)], "at most 1,000"),
    "long": (regex, "a" * 5_000, "at most 4,000"),
    "half letter": (regex, "a\ud800", "half a letter"),
    "half escape": (regex, "a\\", "within an escape"),
    "look-around": (regex, "(?=a)b", "look-ahead"),
    "bracket": (regex, "[", "unclosed"),
    "nested": (regex, "(" * 1_900 + ")" * 1_900, "nested"),
    "nothing": (regex, r"[^\x00-\x{10FFFF}]", "no text has this form"),
    "out of the rule": (regex, "a/\nOTHER: /b", ""),
    "not JSON": (json_schema, "{", "not JSON"),
    "a list": (json_schema, "[]", "expected an object"),
    "NaN": (json_schema, {"minimum": float("nan")}, "not JSON"),
    "reference": (json_schema, {"$ref": "http://127.0.0.1:9/schema"}, "does not fetch"),
    "file": (json_schema, {"$ref": "file:///etc/passwd"}, "does not fetch"),
    "endless": (json_schema, {"$ref": "#"}, "no text has this form"),
    "lenient": (json_schema, {"x-guidance": {"lenient": True}, "not": {}}, "not"),
    "deep": (json_schema, '{"a":' * 5_000 + "1" + "}" * 5_000, "not JSON"),
    "intersections": (json_schema, hostile_intersections(), "too much memory or time"),
    "stack": (json_schema, hostile_references(1_200), "too much memory or time"),
}
SLOW = ["intersections"]


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] if x in SLOW else []) for x in HOSTILE]
)
def test_hostile_constraints_are_refused_in_one_line(name):
    make, given, message = HOSTILE[name]
    if not message:  # valid, and no way into the grammar
        assert make(BYTES, given).allowed()[BYTES.tokenizer.token_bytes.index(b"a")]
        return
    with pytest.raises(InputError, match=message) as error:
        make(BYTES, given)
    assert "\n" not in str(error.value)


def test_large_repeats_cost_nothing():
    """They are not unrolled: `(a{1000}){1000}` is compiled, and an answer has a limit anyway."""
    constraint = regex(BYTES, "(((a{1000}){1000}){1000}){1000}")
    assert walk(BYTES, constraint, np.random.default_rng(0)) is None


def test_a_vocabulary_that_cannot_spell_a_text():
    """A letter without a token is never allowed, and the constraint says so. It has no end."""
    model = loaded(HubTokenizer(sentence_piece().to_str()))
    pieces = [b"" if len(x) == 1 and x not in b" the" else x for x in model.tokenizer.token_bytes]
    model.tokenizer.__dict__["token_bytes"] = pieces
    constraint = choices(model, ["hz"])
    constraint.advance(pieces.index(b" "))
    constraint.advance(pieces.index(b"h"))
    with pytest.raises(InputError, match="choices: no token of this model can come next"):
        constraint.allowed()
    constraint = choices(model, ["h"])
    assert walk(model, constraint, np.random.default_rng(0)) == "h"
    constraint.advance(pieces.index(b" "))
    constraint.advance(pieces.index(b"h"))
    with pytest.raises(InputError, match="the answer has ended"):
        constraint.allowed()
