"""Tokenizers of GGUF files: text is split and merged as llama.cpp and the publishers do."""

import itertools
import json
from pathlib import Path
from typing import Any

import gguf_files as files
import numpy as np
import pytest
import tokenizers

from slam_jax.errors import InputError
from slam_jax.interop.gguf import GGUF

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
LETTERS = tokenizers.pre_tokenizers.ByteLevel.alphabet()


def source(path: Path, metadata: dict[str, Any]) -> GGUF:
    metadata = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    metadata |= {"tokenizer.chat_template": "{{ messages }}", ".vocab_size": 1_000}
    tensors = {"token_embd.weight": np.zeros((1_000, 64), np.float32)}
    return GGUF(files.write_golden(path / "model.gguf", "llama", metadata, tensors))


def made(path: Path, metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(str(source(path, metadata).tokenizer_json))


def byte_level(pre: str | None, **changes: Any) -> dict[str, Any]:
    """All bytes, the words "he", "hell", "hello" of which the merges make only "he", and four
    special tokens."""
    tokens = [*sorted(LETTERS), "he", "hell", "hello", "<s>", "</s>", "<eot>", "<tool>"]
    types = [NORMAL] * 259 + [CONTROL] * 3 + [USER]
    metadata = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types}
    metadata |= {"merges": ["h e"], "bos_token_id": 259, "eos_token_id": 260, "eot_token_id": 261}
    return metadata | changes


TEXT = "I'm 1234 DON'T\r\n \n  x²! HTTPServer/\nfooBar;\n/"
PARTS = {
    "gpt-2": "I 'm ␣1234 ␣DON ' T \r\n␣\n␣ ␣x ² ! ␣HTTPServer / \n fooBar ; \n /",
    "smollm": "I 'm ␣ 1 2 3 4 ␣DON ' T \r\n␣\n␣ ␣x ² ! ␣HTTPServer / \n fooBar ; \n /",
    "llama-bpe": "I 'm ␣ 123 4 ␣DON 'T \r\n␣\n ␣ ␣x ² ! ␣HTTPServer /\n fooBar ;\n /",
    "qwen2": "I 'm ␣ 1 2 3 4 ␣DON 'T \r\n␣\n ␣ ␣x ² ! ␣HTTPServer /\n fooBar ;\n /",
    "deepseek-r1-qwen": "I 'm ␣ 1 2 3 4 ␣DON 'T \r\n␣\n ␣ ␣x ² ! ␣HTTPServer /\n fooBar ;\n /",
    "tekken": "I 'm ␣ 1 2 3 4 ␣DON 'T \r\n␣\n ␣ ␣x ² ! ␣HTTPServer /\n foo Bar ;\n/",
    "default": "I ' m ␣ 123 4 ␣DON ' T \r\n␣\n␣ ␣x ² ! ␣HTTPServer / \n fooBar ; \n /",
}


@pytest.mark.parametrize("pre", PARTS)
def test_text_is_split_by_the_rules_of_its_vocabulary(pre, tmp_path):
    tokenizer = made(tmp_path, byte_level(pre))
    assert tokenizer.pre_tokenizer is not None
    parts = [TEXT[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert parts == [part.replace("␣", " ") for part in PARTS[pre].split(" ")]


def test_a_vocabulary_of_words_keeps_them_whole(tmp_path):
    """Llama 3 and Tekken take a part that is a token, whatever the merges make of it."""
    for pre, expected in (("llama-bpe", ["hello"]), ("gpt-2", ["he", "l", "l", "o"])):
        encoding = made(tmp_path, byte_level(pre)).encode("hello", add_special_tokens=False)
        assert encoding.tokens == expected


def test_letters_of_several_characters_are_composed_where_the_publisher_does(tmp_path):
    for pre, expected in (("qwen2", "\u00e9"), ("smollm", "e\u0301")):
        tokenizer = made(tmp_path, byte_level(pre))
        assert tokenizer.decode(tokenizer.encode("e\u0301").ids) == expected


def test_special_tokens_are_found_in_a_text_and_not_made_of_it(tmp_path):
    tokenizer = made(tmp_path, byte_level("gpt-2"))
    assert tokenizer.encode("<s>he<tool></s>").ids == [259, 256, 262, 260]
    assert tokenizer.decode([259, 256, 262, 260]) == "he<tool>"  # <tool> is not special
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("</s>").tokens == ["<", "/", "s", ">"]


def test_without_types_the_named_tokens_are_special(tmp_path):
    tokenizer = made(tmp_path, byte_level("gpt-2", token_type=None))
    assert tokenizer.encode("<s>he</s><eot>").ids == [259, 256, 260, 261]
    assert tokenizer.encode("<tool>").tokens == ["<", "t", "o", "o", "l", ">"]


@pytest.mark.parametrize(
    ("pre", "changes", "ids"),
    [
        ("gpt-2", {}, [256]),
        ("llama-bpe", {}, [259, 256]),
        ("tekken", {}, [259, 256]),
        ("llama-bpe", {"add_bos_token": False}, [256]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, [259, 256, 260]),
        ("gpt-2", {"add_bos_token": True, "bos_token_id": None}, [256]),
    ],
)
def test_texts_begin_and_end_as_the_file_says(pre, changes, ids, tmp_path):
    found = source(tmp_path, byte_level(pre, **changes))
    tokenizer = tokenizers.Tokenizer.from_str(str(found.tokenizer_json))
    assert tokenizer.encode("he").ids == ids
    assert tokenizer.encode("he", add_special_tokens=False).ids == [256]
    config = found.tokenizer_config
    assert config["add_bos_token"] is (259 in ids) and config["add_eos_token"] is (260 in ids)
    if len(ids) == 3:
        assert tokenizer.encode("he", "he").ids == ids * 2


def test_the_configuration_names_the_special_tokens(tmp_path):
    found = source(tmp_path, byte_level("smollm", padding_token_id=260, unknown_token_id=262))
    assert found.tokenizer_config == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<tool>",
        "add_bos_token": False,
        "add_eos_token": False,
        "chat_template": "{{ messages }}",
    }
    expected = {"bos_token_id": 259, "pad_token_id": 260, "eos_token_id": [260, 261]}
    assert found.generation_config == expected
    found = source(tmp_path, byte_level("smollm", eot_token_id=260, bos_token_id=None))
    assert found.generation_config == {"eos_token_id": 260}


def test_a_file_without_a_tokenizer_has_none(tmp_path):
    found = GGUF(files.write_golden(tmp_path / "model.gguf", "llama"))
    assert found.tokenizer_json is None
    assert found.tokenizer_config == found.generation_config == {}


# --- SentencePiece


def pieces(rng: np.random.Generator) -> dict[str, Any]:
    """Pieces of the letters a, b, c and U+2581 with random scores, of which none are equal."""
    letters = ["\u2581", "a", "b", "c"]
    words = {"".join(rng.choice(letters, rng.integers(2, 6))) for _ in range(150)}
    normal = [*letters, *sorted(words), "<s", "s>", "<", "s", ">"]
    byte = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte, *normal]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(normal)]
    scores = [0.0] * 259 + (-rng.permutation(len(normal)) - 1.0).tolist()
    metadata = {"model": "llama", "pre": "default", "tokens": tokens, "token_type": types}
    return metadata | {"scores": scores, "bos_token_id": 1, "eos_token_id": 2}


def merged(text: str, metadata: dict[str, Any]) -> list[int]:
    """As llama.cpp: of all neighbours that make a piece, those of the best score are merged, the
    first of them first; what is no piece is written in bytes."""
    ids = {token: i for i, token in enumerate(metadata["tokens"])}
    parts = [*("\u2581" + text.replace(" ", "\u2581"))]
    while True:
        pairs = [a + b for a, b in itertools.pairwise(parts)]
        best = [
            (-metadata["scores"][ids[pair]], i)
            for i, pair in enumerate(pairs)
            if pair in ids and metadata["token_type"][ids[pair]] == NORMAL
        ]
        if not best:
            break
        _, i = min(best)
        parts[i : i + 2] = [pairs[i]]
    found = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{x:02X}>"] for x in part.encode()]
    return found


def test_pieces_are_merged_by_their_scores(tmp_path):
    rng = np.random.default_rng(5)
    metadata = pieces(rng)
    tokenizer = made(tmp_path, metadata)
    for _ in range(200):
        text = "".join(rng.choice([*"aaabbbccc  ", "é", "\n", "<s", ">"], rng.integers(1, 25)))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if "<s>" not in text:
            assert ids == merged(text, metadata), text
            assert tokenizer.decode(ids) == text
        else:
            assert 1 in ids
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode("<s><0x0A>").ids
    assert ids[0] == 1 and not {1, 3 + 10} & {*ids[1:]}  # neither is made of text


def test_letters_without_bytes_are_unknown_and_ids_have_defaults(tmp_path):
    """A file that names no special tokens has those of SentencePiece."""
    metadata = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "\u2581", "a"]}
    metadata |= {"scores": [0.0, 0.0, 0.0, -1.0, -2.0], "token_type": [2, 3, 3, 1, 1]}
    found = source(tmp_path, metadata)
    tokenizer = tokenizers.Tokenizer.from_str(str(found.tokenizer_json))
    assert tokenizer.encode("aqqa").ids == [1, 3, 4, 0, 4]
    assert found.generation_config == {"bos_token_id": 1, "eos_token_id": 2}
    assert found.tokenizer_config["add_bos_token"] is True


def test_the_space_before_a_text_can_be_left_out(tmp_path):
    metadata = pieces(np.random.default_rng(6))
    with_space, without = (
        made(tmp_path, metadata | {"add_space_prefix": given}).encode("q").tokens
        for given in (True, False)
    )
    assert with_space == ["<s>", "\u2581", "<0x71>"] and without == ["<s>", "<0x71>"]


REFUSED = [
    ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; expected gpt2 or llama"),
    ({"pre": "command-r"}, "tokenizer.ggml.pre is 'command-r'; expected one of default, gpt-2"),
    ({"pre": None}, "tokenizer.ggml.pre is None; expected .* convert the model with a newer"),
    ({"merges": None}, "tokenizer.ggml.merges is None; expected a list"),
    ({"merges": ["he"]}, "the merge he is no pair of tokens"),
    ({"merges": ["h q\n"]}, "its tokenizer does not fit together"),
    ({"tokens": [*"abcabc"]}, "tokenizer.ggml.tokens is 6 values; expected no text twice"),
    ({"token_type": [1, 1]}, "token_type is 2 values; expected a number for each of the 263"),
    ({"bos_token_id": 263}, "tokenizer.ggml.bos_token_id is 263; expected an id below 263"),
    ({"add_bos_token": "yes"}, "add_bos_token is 'yes'; expected true or false"),
    ({"model": "llama"}, "tokenizer.ggml.scores is None; expected a number for each"),
    ({"model": "llama", "scores": [float("nan")] * 263}, "scores is 263 values; expected finite"),
    ({"model": "llama", "precompiled_charsmap": [1]}, "precompiled_charsmap is 1 values"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_tokenizers_that_are_not_built_are_named_and_the_weights_are_read(
    changes, message, tmp_path
):
    found = source(tmp_path, byte_level("gpt-2") | changes)
    assert found.config["vocab_size"] == 1_000
    with pytest.raises(InputError, match=message) as caught:
        _ = found.tokenizer_json
    assert str(caught.value).startswith(f"{found.name}: ") and "\n" not in str(caught.value)


# --- A real file

TOKENS = Path(__file__).parent / "fixtures" / "gguf" / "smollm2_tokens.json"


@pytest.mark.slow
def test_a_real_tokenizer_gives_the_ids_of_llama_cpp():
    """The ids are those of llama.cpp's server (xllamacpp 2026.10.11549, POST /tokenize)."""
    found = GGUF(files.real_file())
    tokenizer = tokenizers.Tokenizer.from_str(str(found.tokenizer_json))
    for text, ids in json.loads(TOKENS.read_text()):
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert found.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert found.tokenizer_config["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in found.tokenizer_config["chat_template"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_real_tokenizer_gives_the_ids_of_transformers():
    """But for digits: transformers does not split them one by one for this vocabulary."""
    transformers = pytest.importorskip("transformers")
    path = files.real_file()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = tokenizers.Tokenizer.from_str(str(GGUF(path).tokenizer_json))
    texts = [text for text, _ in json.loads(TOKENS.read_text())]
    plain = [text for text in texts if not any(letter.isnumeric() for letter in text)]
    assert len(plain) > 20
    for text in plain:
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"], text
