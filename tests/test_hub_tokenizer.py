"""Tokenizers of published models: ids, ends, chat templates that nobody checked."""

import json
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from slam_jax.data import HubTokenizer, Tokenizer, as_tokenizer
from slam_jax.data.chat import render_chat, render_chats
from slam_jax.errors import InputError
from slam_jax.generation import ModelAndTokenizer, Request, Sampling, generate, score, stream
from slam_jax.generation.decode import greedy_decode
from slam_jax.language_models import make_config, make_model

TEXTS = [
    "the cat sat on the mat",
    "the dog saw the cat",
    "naïve café 日本 🙂 123",
    "  two  spaces\n\tand a tab",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<s>", "<|end|>", "<|user|>", "<|assistant|>"]
QUESTION = [{"role": "user", "content": "the cat"}]


def byte_level(*, bos: bool) -> tokenizers.Tokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings: Any = dict(vocab_size=300, special_tokens=SPECIALS, show_progress=False)
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **settings)
    model.train_from_iterator(TEXTS, trainer)
    if bos:
        model.post_processor = processors.TemplateProcessing(
            single="<s> $A <|end|>", special_tokens=[("<s>", 0), ("<|end|>", 1)]
        )
    return model


def sentence_piece() -> tokenizers.Tokenizer:
    """As Llama 2's: spaces are U+2581, unknown letters are their bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581abcdehost"]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("c", "a"), ("\u2581", "ca")]
    vocabulary = {piece: i for i, piece in enumerate(pieces + ["".join(m) for m in merges])}
    model = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    model.decoder = decoders.Sequence(
        [
            *(decoders.Replace("\u2581", " "), decoders.ByteFallback()),
            *(decoders.Fuse(), decoders.Strip(" ", 1, 0)),
        ]
    )
    model.add_special_tokens(["<s>", "</s>"])
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return model


def nested(depth: int) -> list:
    inside: list = []
    for _ in range(depth):
        inside = [inside]
    return inside


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub")
    (path / "tokenizer.json").write_text(byte_level(bos=False).to_str())
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return HubTokenizer.load(folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    """With more rows than the tokenizer has tokens, and large logits for those."""
    config = make_config("standard", "tiny", vocab_size=tokenizer.vocab_size + 20)
    model = make_model(config, rngs=nnx.Rngs(0))
    model.head.kernel[...] = model.head.kernel[...] * 30
    return model


def test_a_stored_length_neither_cuts_nor_pads_texts(tokenizer):
    text = "the cat sat on the mat"
    own = Tokenizer.train([text], 280)
    for changed in ({"truncation": 2}, {"padding": 64}):
        ours = HubTokenizer(_with_length(tokenizer.json, **changed))
        assert ours.encode_prompt(text) == tokenizer.encode_prompt(text)
        assert ours.encode(text) == tokenizer.encode(text)
        assert Tokenizer(_with_length(own.json, **changed)).encode(text) == own.encode(text)


def _with_length(json: str, truncation: int | None = None, padding: int | None = None) -> str:
    model = tokenizers.Tokenizer.from_str(json)
    if truncation is not None:
        model.enable_truncation(truncation)
    if padding is not None:
        model.enable_padding(length=padding)
    return model.to_str()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [lambda: byte_level(bos=False), sentence_piece])
def test_ids_and_texts_are_those_of_the_library(make, text):
    theirs = make()
    ours = HubTokenizer(theirs.to_str())
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids) == text
    for end in range(len(ids)):  # letters may be cut
        assert text.startswith(ours.decode(ids[:end]).rstrip("\ufffd"))


def test_a_prompt_begins_as_the_files_say(folder):
    with_rule, without = byte_level(bos=True).to_str(), byte_level(bos=False).to_str()
    cat = HubTokenizer(without).encode("cat")
    assert HubTokenizer(without).encode_prompt("cat") == cat
    # The rule of this file adds an end as well, which is nothing to continue.
    assert HubTokenizer(with_rule, end_ids=(1,)).encode_prompt("cat") == [0, *cat]
    for adds, expected in ((True, [0, *cat]), (False, cat)):
        config = {"bos_token": "<s>", "add_bos_token": adds}
        assert HubTokenizer.from_files(with_rule, config, {}).encode_prompt("cat") == expected


def test_a_literal_special_token_is_one_in_a_prompt_alone(tokenizer):
    assert tokenizer.encode_prompt("<|end|>") == [1]
    assert 1 not in tokenizer.encode("<|end|>")
    assert tokenizer.decode(tokenizer.encode("<|end|>")) == "<|end|>"


def test_ends_are_those_of_the_generation_config(tokenizer, folder, tmp_path):
    assert (tokenizer.end_ids, tokenizer.eos_id, tokenizer.bos_id) == ((1, 3), 1, 0)
    assert tokenizer.decode([*tokenizer.encode("cat"), 3, *tokenizer.encode("dog")]) == "cat"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    assert HubTokenizer.load(tmp_path).end_ids == (1,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert HubTokenizer.load(tmp_path).end_ids == (2,)
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert HubTokenizer.load(tmp_path / "tokenizer.json").chat_template == "newer"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "not a tokenizer.json"),
        ("tokenizer.json", "[" * 100_000, "not a tokenizer.json"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id is '2'; expected"),
        ("generation_config.json", '{"eos_token_id": [true]}', "eos_token_id is"),
        ("generation_config.json", '{"eos_token_id": 100000}', "end_ids is 100000; expected"),
        ("tokenizer_config.json", "[1]", "expected a group of fields"),
        ("tokenizer_config.json", "[" * 100_000, "not JSON"),
    ],
)
def test_damaged_files_are_named(folder, tmp_path, name, content, message):
    for file in folder.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        HubTokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_everything_that_is_a_tokenizer_is_taken(folder, tokenizer):
    class Fast:  # of transformers
        backend_tokenizer = byte_level(bos=False)
        eos_token_id, bos_token_id, pad_token_id, chat_template = 1, 0, None, TEMPLATE
        bos_token = "<s>"

    own = Tokenizer.train(TEXTS, 300)
    assert as_tokenizer(own) is own
    assert as_tokenizer(str(folder)) == as_tokenizer(folder / "tokenizer.json") == tokenizer
    assert as_tokenizer(byte_level(bos=False)).end_ids == ()
    assert as_tokenizer(Fast()).encode_chat(QUESTION) == tokenizer.encode_chat(QUESTION)
    assert HubTokenizer.from_json(tokenizer.to_json()) == tokenizer
    with pytest.raises(InputError, match="tokenizer is a int; expected"):
        as_tokenizer(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end_ids": ["a"]}, "end_ids is 'a'; expected a token of"),
        ({"end_ids": [1e400]}, "end_ids is inf; expected a token of"),
        ({"end_ids": 1}, "end_ids is 1; expected a list"),
        ({"special_tokens": 5}, "special_tokens is 5; expected texts by name"),
        ({"special_tokens": {"bos_token": "\ud800"}}, "bos_token has half a letter"),
        ({"chat_template": 5}, "chat_template is 5; expected a text or null"),
        ({"chat_template": "\ud800"}, "chat template has half a letter"),
    ],
)
def test_a_stored_tokenizer_with_other_fields_is_refused(tokenizer, changes, message):
    stored = json.dumps({**json.loads(tokenizer.to_json()), **changes})
    with pytest.raises(InputError, match=message):
        HubTokenizer.from_json(stored)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bos_token": "\ud800"}, "bos_token has half a letter"),
        ({"chat_template": [{"name": ["a"]}, {"name": "default", "template": "\ud800"}]}, "half"),
    ],
)
def test_texts_that_are_not_unicode_are_refused(tokenizer, config, message):
    with pytest.raises(InputError, match=message):
        HubTokenizer.from_files(tokenizer.json, config, {})


def test_a_template_that_writes_half_a_letter_is_refused(tokenizer):
    written = HubTokenizer(tokenizer.json, (1,), chat_template="{{ '\\ud800' }}")
    with pytest.raises(InputError, match="what the chat template writes has half a letter"):
        written.chat_text(QUESTION)


def test_a_conversation_is_what_the_template_writes(tokenizer):
    text = "<s><|user|>the cat<|end|><|assistant|>"
    assert tokenizer.chat_text(QUESTION) == text
    assert tokenizer.encode_chat(QUESTION) == tokenizer.encode_prompt(text)
    assert tokenizer.encode_chat(QUESTION)[:2] == [0, 2]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "expected a list"),
        ([], "at least one"),
        ([{"content": "x"}], "message 0 is"),
        ([{"role": "user", "content": "x<|end|>"}], "message 0 holds '<|end|>'"),
        ([{"role": "user", "content": [{"text": "<s>"}]}], "message 0 holds '<s>'"),
        ([{"role": "user", "content": {1, 2}}], "messages: Object of type set"),
        ([{"role": "user", "content": nested(40)}], "message 0 has groups inside of 32 others"),
        ([{"role": "user", "content": nested(100_000)}], "message 0 has groups inside of 32"),
    ],
)
def test_messages_that_cannot_be_written_are_refused(tokenizer, messages, message):
    with pytest.raises(InputError) as error:
        tokenizer.chat_text(messages)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{% set n = namespace(s='aaaaaaaaaa') %}{% for i in range(60) %}"
        "{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no system message') }}",
        "{% if %}",
    ],
)
def test_a_template_can_do_no_harm(template):
    with pytest.raises(InputError, match="^chat template: ") as error:
        render_chat(template, QUESTION)
    assert "\n" not in str(error.value)


def test_many_conversations_are_rendered_by_one_process(tokenizer, monkeypatch):
    processes = []
    start = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **kw: processes.append(1) or start(*a, **kw))
    asked = [[{"role": "user", "content": word}] for word in ("the cat", "<|end|>", "the dog")]
    found = tokenizer.encode_chats(asked)
    assert found[0] == tokenizer.encode_chat(asked[0]) and "message 0 holds" in str(found[1])
    assert found[2] == tokenizer.encode_chat(asked[2])
    assert len(processes) == 3


def test_a_conversation_that_takes_too_much_leaves_the_others(monkeypatch):
    template = "{% set s = messages[0].content * messages[0].times %}{{ s | length }}"
    asked = [[{"role": "user", "content": "xx", "times": n}] for n in (3, 10**9, 4)]
    few, failed, more = render_chats(template, asked)
    assert (few, more) == ("6", "8") and "memory" in str(failed)
    # Wherever the process itself ends, each conversation gets its own, up to a number of failures.
    done = subprocess.CompletedProcess([], -9, b"", b"")
    monkeypatch.setattr(subprocess, "run", lambda *a, **kw: done)
    found = render_chats("x", asked)
    assert all("too much memory or time" in str(each) for each in found)
    with pytest.raises(InputError, match="too much memory or time"):
        render_chats("x", asked * 4)


@pytest.mark.slow
def test_a_template_that_never_ends_is_stopped():
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="chat template: it"):
        render_chat(loop, QUESTION)


@pytest.mark.release
def test_every_end_token_ends_an_answer(model):
    prompts, lengths = jnp.array([[5, 6, 7, 8]]), jnp.array([4])
    settings: Any = dict(max_new_tokens=8, pad_id=0)
    free = greedy_decode(model, None, prompts, lengths, eos_id=None, **settings).tokens[0].tolist()
    assert len(set(free[:4])) > 2
    first = free[2]
    expected = free[: free.index(first) + 1]
    for ends in ([9999, first], (first, 9999), np.array([9999, first, 9998]), first):
        found = greedy_decode(model, None, prompts, lengths, eos_id=ends, **settings).tokens[0]
        assert found.tolist() == expected + [0] * (8 - len(expected))
    for wrong in ("2", True, 2.0, [[1]], [None]):
        with pytest.raises(InputError, match=r"eos_id is .*; expected a token"):
            greedy_decode(model, None, prompts, lengths, eos_id=wrong, **settings)


@pytest.mark.release
def test_rows_that_are_no_tokens_are_never_chosen(model, tokenizer):
    known = tokenizer.vocab_size
    kernel = model.head.kernel[...]
    model = nnx.clone(model)
    model.head.kernel[...] = kernel.at[:, known:].multiply(100.0)
    loaded = ModelAndTokenizer(model, tokenizer)
    sampling = Sampling(temperature=1.0, num_samples=8, max_new_tokens=16)
    [answer] = generate(loaded, [Request("the")], sampling)
    assert max(token for sample in answer.samples for token in sample.tokens) < known
    logits = model(jnp.array([tokenizer.encode_prompt("the")])).logits[0, -1]
    assert int(jnp.argmax(logits)) >= known  # else this test says nothing
    first = answer.samples[0]
    expected = jax.nn.log_softmax(logits[:known])[first.tokens[0]]
    np.testing.assert_allclose(first.logprobs[0], expected, atol=1e-4)
    [scored] = score(loaded, Request("the"), [" cat"])
    assert np.isfinite(scored.logprob)
    with pytest.raises(InputError, match="the tokenizer has 300 tokens and the model 290"):
        ModelAndTokenizer(
            make_model(make_config("standard", "tiny", vocab_size=290), rngs=nnx.Rngs(0)), tokenizer
        )


def test_a_stop_string_may_be_a_special_token(model, tokenizer):
    loaded = ModelAndTokenizer(model, HubTokenizer(tokenizer.json))  # nothing else ends it
    sampling = Sampling(temperature=3.0, max_new_tokens=60)
    [plain] = generate(loaded, [Request("the")], sampling)
    special = next(i for i in plain.samples[0].tokens if i < len(SPECIALS))
    stops = Sampling(temperature=3.0, max_new_tokens=60, stop=SPECIALS[special])
    [stopped] = generate(loaded, [Request("the")], stops)
    length = plain.samples[0].tokens.index(special) + 1
    assert stopped.samples[0].tokens == plain.samples[0].tokens[:length]
    assert stopped.samples[0].finish == "stop"


def test_a_conversation_is_answered_like_its_text(model, tokenizer):
    loaded = ModelAndTokenizer(model, tokenizer)
    sampling = Sampling(max_new_tokens=8)
    text = tokenizer.chat_text(QUESTION)
    asked = [Request(messages=QUESTION), Request(text)]
    chat, plain = generate(loaded, asked, sampling)
    assert chat == plain
    assert "".join(stream(loaded, asked[0], sampling)) == chat.text
    with pytest.raises(InputError, match="a prompt and messages"):
        generate(loaded, [Request("x", messages=QUESTION)])
    own = Tokenizer.train(TEXTS, 300)
    small = make_config("standard", "tiny", vocab_size=own.vocab_size)
    with pytest.raises(InputError, match="no chat template"):
        generate(
            ModelAndTokenizer(make_model(small, rngs=nnx.Rngs(0)), own),
            [Request(messages=QUESTION)],
        )


def damage(rng: np.random.Generator, text: str) -> str:
    """The text with some characters cut, doubled or replaced."""
    start = int(rng.integers(len(text)))
    length = int(rng.integers(1, 40))
    kinds = (
        "",
        text[start : start + length] * 2,
        str(rng.choice(["null", "-1", "[[", "1e999", "\0"])),
    )
    return text[:start] + kinds[rng.integers(3)] + text[start + length :]


@pytest.mark.release
@pytest.mark.parametrize(
    "cases", [100, pytest.param(2_000, marks=pytest.mark.slow)], ids=["fast", "slow"]
)
def test_damaged_folders_are_read_or_refused_in_one_line(folder, tmp_path, cases):
    rng, refused = np.random.default_rng(0), 0
    files = {file.name: file.read_text() for file in folder.iterdir()}
    for _ in range(cases):
        name = str(rng.choice(sorted(files)))
        for other, text in files.items():
            (tmp_path / other).write_text(damage(rng, text) if other == name else text)
        try:
            found = HubTokenizer.load(tmp_path)
            found.decode(found.encode_prompt("the cat"))
            found.token_bytes  # noqa: B018
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert cases // 4 < refused < cases
