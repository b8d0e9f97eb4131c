"""Texts of one's own as rows of tokens: how they are read, split, packed and drawn."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slam_jax.data import HubTokenizer, Tokenizer
from slam_jax.data.packing import (
    Encoded,
    TextRows,
    cut,
    encode_texts,
    pack,
    scoring_batches,
    text_batches,
)
from slam_jax.data.records import DataError
from slam_jax.data.text_dataset import open_texts
from slam_jax.data.texts import SPLITS, Text, TextColumns, TextDataConfig, read_own_texts
from slam_jax.errors import ConfigError, InputError

TOKENIZER = Tokenizer.train(["one two three"], 262)
CHAT = "{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}{% endfor %}<bos>"


def encoded(*sizes: int) -> list[Encoded]:
    """Documents of different tokens."""
    ends = np.cumsum(sizes)
    return [
        Encoded(np.arange(end - n, end, dtype=np.int32), 1)
        for n, end in zip(sizes, ends, strict=True)
    ]


def config(path: Path, **changes: Any) -> TextDataConfig:
    return TextDataConfig(path=str(path), **{"length": 16, **changes})


def words(texts: Any) -> dict[str, list[str]]:
    return {name: sorted(each.text for each in found) for name, found in texts.splits.items()}


# --- Packing


@given(st.lists(st.integers(1, 9), max_size=40))
@settings(deadline=None)
def test_packed_rows_have_every_piece_once_and_are_no_longer_than_their_room(sizes):
    rows = pack(sizes, 9)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in row) for row in rows]
    assert all(0 < n <= 9 for n in filled)
    # No two rows could be one.
    assert sum(n <= 4 for n in filled) <= 1


def test_every_token_but_the_first_is_predicted_once():
    texts = encoded(2, 5, 6, 11, 1)
    pieces = cut(texts, 5)
    predicted = [(p.text, at) for p in pieces for at in range(p.start + 1, p.end)]
    assert predicted == [(i, at) for i, x in enumerate(texts) for at in range(1, len(x.ids))]
    assert all(p.end - p.start <= 6 for p in pieces)


def test_a_row_has_whole_pieces_with_numbers_of_their_own():
    texts = [*encoded(2, 5, 6, 11), Encoded(np.arange(90, 94, dtype=np.int32), 3)]
    rows = TextRows.of(texts, 9, packed=True, pad_id=77)
    batch, seen = rows.batch(range(len(rows))), []
    assert batch.tokens.shape == (len(rows), 10)
    for tokens, segments, counted in zip(batch.tokens, batch.segments, batch.counted, strict=True):
        real = segments > 0
        assert (tokens[~real] == 77).all() and not counted[~real].any()
        for segment in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == segment)
            assert (np.diff(places) == 1).all()
            [text] = [x for x in texts if tokens[places[0]] in x.ids]
            at = text.ids.tolist().index(tokens[places[0]])
            np.testing.assert_array_equal(tokens[places], text.ids[at : at + len(places)])
            expected = [max(at + 1, text.first) <= at + i for i in range(len(places))]
            assert counted[places].tolist() == expected
            seen += tokens[places][counted[places]].tolist()
    assert sorted(seen) == sorted(t for x in texts for t in x.ids[x.first :].tolist())


def test_rows_of_one_text_are_padded_to_the_longest():
    rows = TextRows.of(encoded(2, 5, 3), 9, packed=False, pad_id=0)
    batch = rows.batch([0, 1, 2])
    assert (batch.tokens.shape, batch.packed) == ((3, 5), False)
    assert (batch.segments.max(axis=1) == 1).all()


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    rows = TextRows.of(encoded(*range(2, 30)), 9, packed=True, pad_id=0)

    def drawn(start: int, count: int, of: Any = range(4), seed: int = 3) -> list[np.ndarray]:
        batches: Any = text_batches(rows, 4, seed, start_step=start, rows=of)
        found = [next(batches)[1].tokens for _ in range(count)]
        batches.close()
        return found

    whole, epoch = drawn(0, 40), len(rows)
    np.testing.assert_array_equal(whole[37:], drawn(37, 3))
    np.testing.assert_array_equal(drawn(5, 1, of=[2, 3])[0], whole[5][2:])
    first, second = (np.concatenate(whole)[i * epoch : (i + 1) * epoch] for i in range(2))
    assert (np.unique(first, axis=0) == np.unique(second, axis=0)).all()
    assert len(np.unique(first, axis=0)) == epoch and (first != second).any()
    assert any((a != b).any() for a, b in zip(whole[:3], drawn(0, 3, seed=4), strict=True))


@pytest.mark.parametrize("shuffled", [False, True])
def test_scoring_takes_every_row_once_and_knows_its_texts(shuffled):
    texts = encoded(4, 5, 6, 7, 12)
    rows, seen = TextRows.of(texts, 9, packed=True, pad_id=0), []
    for batch, owners in scoring_batches(rows, 3, shuffled=shuffled):
        assert batch.tokens.shape == (3, 10)
        for token, owner in zip(batch.tokens[batch.counted], owners[batch.counted], strict=True):
            assert token in texts[owner].ids
            seen.append(token)
    assert sorted(seen) == sorted(t for x in texts for t in x.ids[1:].tolist())


def test_the_first_rows_of_a_shuffled_scoring_are_a_sample():
    rows = TextRows.of(encoded(*range(2, 80)), 100, packed=False, pad_id=0)

    def first(**how):
        batch, _ = next(scoring_batches(rows, 8, **how))
        return (batch.segments > 0).sum(axis=1)

    ordered, shuffled = first(), first(shuffled=True)
    assert ordered.tolist() == [*range(2, 10)]  # the mean of all is 40.5
    assert abs(shuffled.mean() - 40.5) < 10
    np.testing.assert_array_equal(shuffled, first(shuffled=True))


# --- Tokens


def test_an_answer_alone_counts_with_its_end():
    [refused, found] = encode_texts(
        TOKENIZER, [Text("two", "one <eos>?"), Text("two", "one?")], chat=False
    )
    assert isinstance(refused, InputError) and "holds '<eos>'" in str(refused)
    assert isinstance(found, Encoded)
    assert found.ids[found.first :].tolist() == [*TOKENIZER.encode("two"), TOKENIZER.eos_id]
    assert found.ids[: found.first].tolist() == TOKENIZER.encode_prompt("one?")
    chat = dataclasses.replace(HubTokenizer.of(TOKENIZER), chat_template=CHAT)
    given = [Text("two", "one?"), Text("x"), Text("three", "a <eos>"), Text("four", "b")]
    found, document, refused, last = encode_texts(chat, given, chat=True)
    message = [{"role": "user", "content": "one?"}]
    assert isinstance(found, Encoded) and isinstance(last, Encoded)
    assert found.ids[: found.first].tolist() == chat.encode_chat(message)
    assert chat.decode(found.ids[found.first :]) == "two"
    assert isinstance(document, Encoded) and document.first == 1
    assert isinstance(refused, InputError) and "holds '<eos>'" in str(refused)
    assert chat.decode(last.ids[last.first :]) == "four"


def test_a_conversation_is_asked_with_its_roles(tmp_path):
    said = ("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c")
    messages = [{"role": role, "content": text} for role, text in said]
    answer = {"role": "assistant", "content": "d"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [*messages, answer]}) + "\n")
    texts = read_own_texts(config(path, held_out=0.0)).splits["train"]
    assert [(each.prompt, each.text) for each in texts] == [
        ("be brief\na", "b"),
        ("be brief\na\nb\nc", "d"),
    ]
    chat = dataclasses.replace(HubTokenizer.of(TOKENIZER), chat_template=CHAT)
    found: Any = encode_texts(chat, texts, chat=True)
    for i, each in enumerate(found):
        expected = chat.encode_chat(messages[: 2 + 2 * i])
        assert each.ids[: each.first].tolist() == expected


def test_the_tokens_of_a_template_with_a_date_are_the_same_on_every_day(monkeypatch):
    template = "{{ strftime_now('%d %b %Y, %f') }}" + CHAT
    chat = dataclasses.replace(HubTokenizer.of(TOKENIZER), chat_template=template)
    [found] = encode_texts(chat, [Text("two", "one?")], chat=True)
    assert isinstance(found, Encoded)
    assert chat.decode(found.ids[: found.first]).startswith("26 Jul 2024, 000000")
    assert "2024" not in chat.chat_text([{"role": "user", "content": "one?"}])


def test_special_tokens_in_a_document_are_letters():
    for tokenizer in (TOKENIZER, HubTokenizer.of(TOKENIZER)):
        [found] = encode_texts(tokenizer, [Text("a<eos>b")], chat=False)
        assert isinstance(found, Encoded)
        assert (found.ids == TOKENIZER.eos_id).sum() == 1
        assert (found.ids[0], found.first) == (TOKENIZER.bos_id, 1)


# --- Reading


def test_a_folder_of_texts_is_a_document_a_file(tmp_path):
    for name in ("a.txt", "b.md", "c.rst", ".hidden.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "d.txt").write_text("text of d")
    found = read_own_texts(config(tmp_path))
    assert sorted(itertools.chain(*words(found).values())) == [
        "text of a.txt",
        "text of b.md",
        "text of d",
    ]
    (tmp_path / "a.txt").write_text("\none\ntwo\n\nthree\n  \n\n four\n\nfive")
    found = sorted(itertools.chain(*words(read_own_texts(config(tmp_path / "a.txt"))).values()))
    assert found == [" four", "five", "one\ntwo", "three"]
    (tmp_path / "e.txt").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"e.txt: not UTF-8 .*; save it as UTF-8, or remove it"):
        read_own_texts(config(tmp_path))


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        arrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [list(rows[0]), *(row.values() for row in rows)]
        path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
def test_a_table_has_documents_or_answers(tmp_path, name):
    pytest.importorskip("pyarrow.parquet")
    rows = [{"body": f"text {i}", "split": s} for i, s in enumerate(("train", "val", "test", ""))]
    path = table(tmp_path / name, rows)
    found = words(read_own_texts(config(path, columns=TextColumns(text="body"))))
    assert found["validation"][0] == "text 1" and "text 2" in found["test"]
    assert words(read_own_texts(config(tmp_path, columns=TextColumns(text="body")))) == found
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(9)]
    path = table(tmp_path / f"answers{path.suffix}", rows)
    texts = read_own_texts(config(path))
    assert texts.have_answers
    assert {(x.prompt, x.text) for x in texts.all} == {(f"p{i}", str(i)) for i in range(9)}
    with pytest.raises(DataError, match=r"row \d: no text in a column 'reply' or 'body'"):
        read_own_texts(config(path, columns=TextColumns(answer="reply", text="body")))


def test_the_hash_of_a_document_chooses_its_split(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(200)]
    found = words(read_own_texts(config(table(tmp_path / "a.jsonl", rows))))
    sizes = {name: len(each) for name, each in found.items()}
    assert sum(sizes.values()) == 200 and 8 <= sizes["test"] <= 35 and sizes["validation"] >= 8
    more = [*rows[::-1], {"text": "another"}, {"text": "text 3"}]
    again = words(read_own_texts(config(table(tmp_path / "b.jsonl", more))))
    assert all(set(found[name]) <= set(again[name]) for name in found)
    assert not set(again["train"]) & (set(again["test"]) | set(again["validation"]))
    # Rows of one prompt stay together, whatever their answers.
    rows = [{"prompt": f"p{i % 20}", "answer": str(i)} for i in range(100)]
    texts = read_own_texts(config(table(tmp_path / "c.jsonl", rows)))
    prompts = [{x.prompt for x in each} for each in texts.splits.values()]
    assert sum(map(len, prompts)) == 20


def test_a_given_split_is_kept_where_prompts_are_the_same(tmp_path):
    rows = [
        {"prompt": f"q{i % 5}", "answer": f"{split} {i}", "split": split}
        for split, count in (("train", 9), ("validation", 7), ("test", 6))
        for i in range(count)
    ]
    rows += [{"prompt": "q0", "answer": "follows"}, {"prompt": "other", "answer": "is free"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_own_texts(config(path))
    for split in SPLITS:
        expected = {row["answer"] for row in rows if row.get("split") == split}
        assert expected == set(words(found)[split]) - {"follows", "is free"}
    assert "follows" in words(found)["train"]
    assert found.notes == (
        "prompts or texts that are in more than one split: 5; scores on them are too good",
    )
    path.write_text("\n".join(json.dumps({**row, "prompt": row["answer"]}) for row in rows))
    assert read_own_texts(config(path)).notes == ()


def test_the_answers_of_a_conversation_are_in_one_split(tmp_path):
    def turns(i: int) -> list[dict[str, str]]:
        said = (
            ("user", f"first {i}"),
            ("assistant", f"{i}"),
            ("user", "and?"),
            ("assistant", f"{i}"),
        )
        return [{"role": role, "content": text} for role, text in said]

    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"messages": turns(i)}) for i in range(60)))
    found = words(read_own_texts(config(path, held_out=0.3)))
    assert sum(map(len, found.values())) == 120 and all(found.values())
    for a, b in itertools.combinations(found.values(), 2):
        assert not set(a) & set(b)


def test_nothing_is_held_out_where_the_share_is_0(tmp_path):
    path = table(tmp_path / "a.jsonl", [{"text": f"text {i}"} for i in range(2)])
    with pytest.raises(DataError, match="none is for validation.*data.held_out=0"):
        read_own_texts(config(path))
    texts = read_own_texts(config(path, held_out=0.0))
    assert words(texts) == {name: ["text 0", "text 1"] for name in SPLITS}
    assert "nothing is held out" in texts.notes[0]
    dataset = open_texts(config(path, held_out=0.0), TOKENIZER)
    assert [len(rows.texts) for rows in dataset.splits.values()] == [2, 2, 2, 2]


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    good = [{"prompt": f"p{i}", "answer": "yes"} for i in range(20)]
    path = table(tmp_path / "a.jsonl", [*good, {"prompt": "p", "answer": " "}, {"prompt": "x"}])
    with pytest.raises(DataError, match=r"row 21: no text .*\(and 1 more such\).*records=2"):
        read_own_texts(config(path, max_damaged_records=1))
    assert len(read_own_texts(config(path, max_damaged_records=2)).all) == 20
    long = [*good, {"prompt": "p" * 40, "answer": "no"}]
    path = table(tmp_path / "b.jsonl", long)
    with pytest.raises(DataError, match=r"row 21: prompt and answer have \d+ tokens; data.length"):
        open_texts(config(path, max_damaged_records=0), TOKENIZER)
    assert len(open_texts(config(path), TOKENIZER).splits["all"].texts) == 20


def test_settings_that_do_not_fit_are_told(tmp_path):
    path = table(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "answer": "yes"} for i in range(20)])
    with pytest.raises(ConfigError, match="data.chat is True; expected False: the tokenizer has"):
        open_texts(config(path, chat=True), TOKENIZER)
    with pytest.raises(ConfigError, match="data.pack is True; expected False: this model reads"):
        open_texts(config(path, pack=True), TOKENIZER, can_pack=False)
    assert not open_texts(config(path), TOKENIZER, can_pack=False).splits["train"].packed
    with pytest.raises(DataError, match="nowhere: no such folder or file"):
        read_own_texts(config(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="data.path is not given"):
        read_own_texts(TextDataConfig())
