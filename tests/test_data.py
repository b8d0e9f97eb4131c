"""Sort-of-CLEVR, its views, the tokenizer and the batches."""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
import tokenizers
from tokenizers.models import BPE

from slam_jax.data import (
    HALF_VIEWS,
    TRAINING_VIEWS,
    DataConfig,
    Example,
    Tokenizer,
    evaluation_batches,
    prepare,
    training_batches,
)
from slam_jax.data.records import DamagedRecord, DataError, Records
from slam_jax.data.scenes import Scenes, describe, tabulate
from slam_jax.data.sort_of_clevr import (
    ANSWERS,
    COLOURS,
    PROMPTS,
    SHAPES,
    SortOfClevr,
    answer_table,
    draw,
    make_scene,
    needs_both,
)
from slam_jax.errors import ConfigError
from slam_jax.slam_v3 import ImageConfig, SlamV3Config

STAGES = ((0, {"aux": 1.0}), (3, {view: 1.0 for view in TRAINING_VIEWS}))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("data"))
    return DataConfig("sort_of_clevr/tiny", directory, batch_size=8, seed=3, stages=STAGES)


@pytest.fixture(scope="module")
def dataset(config):
    return prepare(config)


def built(directory, split="train"):
    builder: Any = SortOfClevr(data_dir=directory, config="tiny", file_format="array_record")
    return builder.as_data_source(split=split)


def assert_same(a, b):
    leaves_a, tree_a = jax.tree.flatten(a)
    leaves_b, tree_b = jax.tree.flatten(b)
    assert tree_a == tree_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        np.testing.assert_array_equal(x, y)


# --- Scenes


def test_scenes_are_the_same_everywhere():
    digest = hashlib.sha256()
    for index in range(50):
        for array in make_scene(index):
            digest.update(array.astype("<i4").tobytes())
    assert digest.hexdigest()[:16] == "c90051a20efe1035"


def test_two_builds_hold_the_same_records(config, dataset, tmp_path):
    prepare(dataclasses.replace(config, data_dir=str(tmp_path)))
    for split in ("train", "validation", "test"):
        one, two = built(config.data_dir, split), built(tmp_path, split)
        assert len(one) == len(two)
        assert_same([one[i] for i in range(len(one))], [two[i] for i in range(len(two))])


def test_splits_share_no_scene_and_have_the_published_sizes(config, dataset, tmp_path):
    full: Any = SortOfClevr(data_dir=tmp_path).builder_config
    assert (full.train, full.validation, full.test) == (9300, 500, 200)
    firsts = {"train": 0, "validation": 9300, "test": 9800}
    for split, first in firsts.items():
        records = built(config.data_dir, split)
        assert [r["index"] for r in records] == list(range(first, first + len(records)))


def test_stored_picture_is_the_drawing_of_its_objects(config, dataset):
    for record in itertools.islice(built(config.data_dir), 20):
        np.testing.assert_array_equal(record["image"], draw(record["objects"], range(6)))


def test_drawing_shows_each_visible_object_whole_in_its_colour():
    objects, _ = make_scene(0)
    objects[:2, 0] = 0, 1
    for visible in ([0, 1, 2, 3, 4, 5], [1, 4]):
        pixels = draw(objects, visible).reshape(-1, 3)
        colours, counts = np.unique(pixels, axis=0, return_counts=True)
        counts = dict(zip(map(tuple, colours.tolist()), counts.tolist(), strict=True))
        assert len(counts) == len(visible) + 1
        assert counts[(0, 255, 0)] == 121  # the green square, 11 x 11
    assert draw(objects, [0])[objects[0, 2], objects[0, 1]].tolist() == [255, 0, 0]
    assert (draw(objects, [0]) != 255).any(-1).sum() == 97  # lattice points within 5.5 of a centre


def brute_force_answer(objects, question, known):
    colour, kind, subtype = question
    shape, x, y = objects[colour]
    others = [o for c, o in enumerate(objects) if c != colour and c in known]
    by_distance = sorted(others, key=lambda o: math.dist(o[1:], (x, y)))
    if kind == 0:
        return (SHAPES[shape], *("yes" if v < 37.5 else "no" for v in (x, y)))[subtype]
    alike = 1 + sum(o[0] == shape for o in others)
    return (SHAPES[by_distance[0][0]], SHAPES[by_distance[-1][0]], str(alike))[subtype]


def test_answers_count_all_eight_objects_of_a_shifted_scene():
    for index in range(20):
        objects, questions = make_scene(20_000 + index, 8)
        table = answer_table(objects)
        for colour, kind, subtype in questions.tolist():
            answer = brute_force_answer(objects.tolist(), (colour, kind, subtype), range(8))
            assert ANSWERS[table[kind, colour, subtype]] == answer


def test_a_training_example_may_have_some_of_the_questions(config, dataset):
    few = prepare(dataclasses.replace(config, questions=5), dataset.tokenizer)
    whole = dataset.train.render(dataset.train[3], "aux", np.random.default_rng(0))
    answers = dict(zip(whole.prompts, whole.answers, strict=True))
    asked = set()
    for seed in range(20):
        example = few.train.render(few.train[3], "aux", np.random.default_rng(seed))
        assert len(example.prompts) == len(example.kinds) == len(example.needs_both) == 5
        assert all(answers[p] == a for p, a in zip(example.prompts, example.answers, strict=True))
        asked |= set(example.prompts)
    assert asked == set(whole.prompts)
    test = few.test.render(few.test[0], "aux", np.random.default_rng(0))
    assert len(test.prompts) == 20
    with pytest.raises(ConfigError, match=r"data.questions is 5; expected None; only sort_of"):
        prepare(dataclasses.replace(config, name="digits", questions=5))


def test_a_training_example_may_describe_some_objects(config, dataset):
    more = prepare(dataclasses.replace(config, questions=2, descriptions=3), dataset.tokenizer)
    scene, told = more.train[3], {}
    for seed in range(20):
        example = more.train.render(scene, "image", np.random.default_rng(seed))
        assert example.kinds[2:] == ("description",) * 3 and len(set(example.prompts[2:])) == 3
        told |= dict(zip(example.prompts[2:], example.answers[2:], strict=True))
    sentences = describe(scene.objects, range(6)).split(" .")[:6]
    words = [sentence.split(maxsplit=1) for sentence in sentences]
    assert told == {f"describe {colour}": place for colour, place in words}
    # The longest of them fits, and evaluation asks for none.
    answers, prompts = (
        max(len(dataset.tokenizer.encode(text)) for text in texts)
        for texts in (told.values(), told)
    )
    assert more.train.answer_length(dataset.tokenizer) >= answers
    assert more.train.question_length(dataset.tokenizer) >= prompts + answers
    test = more.test.render(more.test[0], "image", np.random.default_rng(0))
    assert len(test.prompts) == 20 and "description" not in test.kinds
    with pytest.raises(ConfigError, match=r"data.descriptions is 1; expected 0; only sort_of"):
        prepare(dataclasses.replace(config, name="digits", descriptions=1))


def test_a_training_example_may_describe_the_closest_objects(config, dataset):
    config = dataclasses.replace(config, questions=1, descriptions=6, closest_objects=4)
    train, named = prepare(config, dataset.tokenizer).train, set()
    encode = dataset.tokenizer.encode
    for i in range(20):
        example = train.render(train[i], "image", np.random.default_rng(i))
        rows = list(zip(example.prompts, example.answers, strict=True))
        assert len(rows) == len({*rows}) == len(example.kinds) == len(example.needs_both) == 11
        own = {prompt.split()[-1]: answer.split() for prompt, answer in rows[1:7]}
        for prompt, answer in rows[7:]:
            start, colour = prompt.rsplit(maxsplit=1)
            x, y = map(int, own[colour][-2:])
            apart = {
                (int(other[-2]) - x) ** 2 + (int(other[-1]) - y) ** 2: f"{name} {' '.join(other)}"
                for name, other in own.items()
                if name != colour
            }
            assert (start, answer) == ("describe closest to", apart[min(apart)])
            named.add(colour)
        assert max(len(encode(answer)) for _, answer in rows) <= train.answer_length(
            dataset.tokenizer
        )
        longest = max(len(encode(prompt)) + len(encode(answer)) for prompt, answer in rows)
        assert longest <= train.question_length(dataset.tokenizer)
    assert named == {*COLOURS}
    with pytest.raises(ConfigError, match=r"closest_objects is 7; expected at most 6"):
        dataclasses.replace(config, closest_objects=7)
    with pytest.raises(ConfigError, match=r"data.closest_objects is 1; expected 0; only sort_of"):
        prepare(DataConfig("digits", closest_objects=1))


def test_answers_are_right_and_never_ambiguous(config, dataset):
    for record in itertools.islice(built(config.data_dir), 100):
        objects = record["objects"].tolist()
        for question, answer in zip(record["questions"].tolist(), record["answers"], strict=True):
            assert ANSWERS[answer] == brute_force_answer(objects, question, range(6))
        assert [kind for _, kind, _ in record["questions"].tolist()] == [0] * 10 + [1] * 10
        for a in objects:
            assert len({(a[1] - b[1]) ** 2 + (a[2] - b[2]) ** 2 for b in objects}) == 6
            assert sum(abs(a[1] - b[1]) <= 10 and abs(a[2] - b[2]) <= 10 for b in objects) == 1
            assert min(a[1:]) >= 5 and max(a[1:]) <= 69


def test_needs_both_means_the_half_with_the_named_object_answers_wrongly(config, dataset):
    rng, seen = np.random.default_rng(0), set()
    for record in itertools.islice(built(config.data_dir), 50):
        order = rng.permutation(6).tolist()
        halves = order[:3], order[3:]
        questions, answers = record["questions"], record["answers"]
        both = needs_both(record["objects"], questions, answers, halves[0])
        for question, answer, flag in zip(questions.tolist(), answers, both, strict=True):
            half = next(half for half in halves if question[0] in half)
            given = brute_force_answer(record["objects"].tolist(), question, half)
            assert flag == (given != ANSWERS[answer])
            assert not (flag and question[1] == 0)
            seen.add((question[1], bool(flag)))
    assert seen == {(0, False), (1, False), (1, True)}


# --- Renderings


def test_text_and_table_say_what_the_objects_are():
    objects = np.array([[0, 12, 40], [1, 69, 5]] + [[0, 30, 30]] * 4)
    assert describe(objects, [1, 0]) == "green square at 69 5 . red circle at 12 40 ."
    np.testing.assert_allclose(
        tabulate(objects, [1]), [[0, 1, 0, 0, 0, 0, 0, 1, 69 / 37 - 1, 5 / 37 - 1]], rtol=1e-6
    )
    assert tabulate(objects, [1]).dtype == np.float32


def named(example):
    """The colours in the text and in the table of an example, in order."""
    words = (example.text or "").split()
    rows = [] if example.aux is None else example.aux[:, :6].argmax(-1).tolist()
    return [word for word in words if word in COLOURS], [COLOURS[i] for i in rows]


def coloured(image):
    objects = np.array([[1, 6 + 12 * i, 37] for i in range(6)])
    palette = {tuple(draw(objects, [i])[37, 6 + 12 * i]): c for i, c in enumerate(COLOURS)}
    return {palette[tuple(p)] for p in image.reshape(-1, 3) if tuple(p) in palette}


def test_split_views_show_every_object_once_and_their_halves_the_same_ones(dataset):
    source = dataset.validation
    for i in range(10):
        shown = {
            view: source.render(source[i], view, np.random.default_rng((0, i)))
            for view in (*TRAINING_VIEWS, *HALF_VIEWS)
        }
        for other in ("text", "aux"):
            split = shown[f"split_image_{other}"]
            listed = [*named(split)[0], *named(split)[1]]
            assert len(listed) == 3 and coloured(split.image) | set(listed) == set(COLOURS)
            only_image = shown[f"split_image_{other}_only_image"]
            only_other = shown[f"split_image_{other}_only_{other}"]
            assert_same(only_image, split._replace(text=None, aux=None))
            assert_same(only_other, split._replace(image=None))
        assert shown["image_text"].text == shown["text"].text
        assert_same(shown["image_text"].image, shown["image"].image)
        assert not any(any(shown[v].needs_both) for v in ("image", "text", "aux", "image_text"))


def test_objects_are_listed_in_random_order(dataset):
    source = dataset.train
    for view, place in (("text", 0), ("aux", 1)):
        examples = [source.render(source[0], view, np.random.default_rng(i)) for i in range(100)]
        assert len({named(e)[place][0] for e in examples}) == 6


# --- Tokenizer


def test_words_of_the_data_are_single_tokens(dataset):
    tokenizer = dataset.tokenizer
    for number in range(5, 70):
        assert len(tokenizer.encode(f" {number}")) == 1
    assert len(tokenizer.encode("red circle at 12 40 .")) == 6
    assert len(tokenizer.encode("red circle at 12 40 . gray square at 5 69 .")) == 12
    prompts = [p.format(c) for kind in PROMPTS for p in kind for c in COLOURS]
    assert max(len(tokenizer.encode(p)) for p in prompts) <= 5
    assert max(len(tokenizer.encode(a)) for a in ANSWERS) == 1


def test_tokenizer_gives_back_any_text_and_no_text_is_a_special_token(dataset, tmp_path):
    dataset.tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded == dataset.tokenizer == Tokenizer.from_json(loaded.to_json())
    assert loaded.sha256 == dataset.tokenizer.sha256
    rng = np.random.default_rng(0)
    texts = ["", "  a\n\tb ", "naïve 漢字 🚀", "<bos>red<eos><pad>", "\x00\u200b\u0301"]
    for _ in range(200):
        points = rng.integers(0x110000, size=rng.integers(20))
        texts.append("".join(chr(p) for p in points if not 0xD800 <= p < 0xE000))
    for tokenizer in (loaded, dataset.tokenizer):
        for text in texts:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_decode_stops_at_eos_and_leaves_out_specials(dataset):
    t = dataset.tokenizer
    ids = [t.bos_id, *t.encode("yes"), t.pad_id, t.eos_id, *t.encode("no")]
    assert t.decode(np.array(ids)) == "yes"


def test_tokenizer_training_is_deterministic_and_bounded(dataset):
    texts = list(dataset.train.corpus())
    assert Tokenizer.train(texts, 512).sha256 == Tokenizer.train(texts, 512).sha256
    assert Tokenizer.train(texts, 300).vocab_size == 300
    assert dataset.tokenizer.vocab_size <= 512
    with pytest.raises(ValueError, match="vocab_size is 100.* at least 259"):
        Tokenizer.train(texts, 100)


@pytest.mark.parametrize("text", ["{}", "no json", tokenizers.Tokenizer(BPE()).to_str()])
def test_a_foreign_tokenizer_is_refused(text):
    with pytest.raises(ValueError, match="^tokenizer: "):
        Tokenizer(text)


# --- Batches


def take(dataset, config, count, **kwargs):
    batches = training_batches(dataset.train, dataset.tokenizer, config, **kwargs)
    return list(itertools.islice(batches, count))


def test_a_batch_depends_on_seed_and_step_alone(dataset, config):
    whole = take(dataset, config, 12)
    assert_same(whole, take(dataset, config, 12))
    assert_same(whole[7:], take(dataset, config, 5, start_step=7))
    other = take(dataset, dataclasses.replace(config, seed=4), 3)
    assert not np.array_equal(whole[0][1].tokens, other[0][1].tokens)


def test_local_batches_make_up_the_batch_of_one_process(dataset, config):
    parts = [take(dataset, config, 8, rows=range(2 * i, 2 * i + 2)) for i in range(4)]
    for (view, batch), *local in zip(take(dataset, config, 8), *parts, strict=True):
        assert {v for v, _ in local} == {view}
        assert_same(batch, jax.tree.map(lambda *x: np.concatenate(x), *[b for _, b in local]))


def test_an_epoch_shows_every_scene_once_in_an_order_of_its_own(dataset, config):
    config = dataclasses.replace(config, batch_size=64, stages=[[0, {"text": 1}]])
    batches: list[Any] = [batch for _, batch in take(dataset, config, 8)]
    scenes = [row.tobytes() for batch in batches for row in batch.tokens]
    first, second = scenes[:256], scenes[256:]
    assert len(set(first)) == 256 and set(first) == set(second) and first != second
    texts = [row.tobytes() for batch in batches for row in batch.inputs.text]
    assert len(set(texts)) > 500  # rendered anew


@pytest.mark.parametrize("view", [*TRAINING_VIEWS, *HALF_VIEWS])
def test_a_batch_has_the_inputs_of_its_view_and_nothing_else(dataset, view):
    batch = next(evaluation_batches(dataset.validation, dataset.tokenizer, view, 4, seed=0)).batch
    name = view.replace("split_", "").split("_only_")[-1]
    parts = set(["image", "text", "aux"] if name == "all" else name.split("_"))
    shapes = {"image": (4, 75, 75, 3), "text": (4, 36), "aux": (4, 6, 10)}
    if view.startswith("split"):
        shapes |= {"text": (4, 18), "aux": (4, 3, 10)}
    for stream, shape in shapes.items():
        value = getattr(batch.inputs, stream)
        assert (value is not None) == (stream in parts)
        assert value is None or value.shape == shape
        assert getattr(batch.inputs, f"{stream}_mask") is None
    assert batch.tokens.shape == (4, 20, 7)


def test_tokens_are_bos_prompt_answer_eos_and_pads(dataset):
    tokenizer = dataset.tokenizer
    batches = evaluation_batches(dataset.validation, tokenizer, "image_text", 4, seed=0)
    batch: Any
    batch, examples, _ = next(batches)
    for b, example in enumerate(examples):
        assert tokenizer.decode(batch.inputs.text[b]) == example.text
        assert_same(batch.inputs.image[b], example.image)
        for q, (prompt, answer) in enumerate(zip(example.prompts, example.answers, strict=True)):
            tokens = batch.tokens[b, q].tolist()
            split, end = int(batch.prompt_length[b, q]), int(batch.length[b, q])
            assert tokens[0] == tokenizer.bos_id and tokens[end - 1] == tokenizer.eos_id
            assert tokenizer.decode(tokens[1:split]) == prompt
            assert tokenizer.decode(tokens[split:]) == answer
            assert tokens[end:] == [tokenizer.pad_id] * (len(tokens) - end)


def test_evaluation_shows_each_scene_once_in_order_and_pads_the_last_batch(dataset):
    def batches(view):
        args = dataset.validation, dataset.tokenizer, view, 12
        return list(evaluation_batches(*args, seed=5))

    found = batches("split_image_text")
    assert [b.valid for b in found] == [12, 12, 8] == [len(b.examples) for b in found]
    assert_same(found, batches("split_image_text"))
    prompts = [e.prompts for b in found for e in b.examples]
    source = dataset.validation
    assert prompts == [source[i].prompt_texts for i in range(len(source))]
    last = found[-1].batch
    for leaf in jax.tree.leaves(last):
        assert len(leaf) == 12
        np.testing.assert_array_equal(leaf[8:], np.repeat(leaf[7:8], 4, 0))


def test_the_first_batches_of_a_shuffled_evaluation_are_a_sample_of_all(dataset):
    def records(size) -> Any:
        args = dataset.validation, dataset.tokenizer, "text", size
        made = evaluation_batches(*args, seed=5, shuffled=True)
        return [e.record for batch in made for e in batch.examples]

    found = records(12)
    assert sorted(found) == [*range(len(dataset.validation))] != found
    assert min(found[:12]) < 8 and max(found[:12]) >= 24  # of 32
    assert records(5) == found  # whatever the size of a batch, and each time
    args = dataset.validation, dataset.tokenizer, "text", 32
    [[_, shuffled, _]], [[_, ordered, _]] = (
        evaluation_batches(*args, seed=5, shuffled=each) for each in (True, False)
    )
    assert_same(shuffled, [ordered[i] for i in found])


class Captions:
    """Another kind of source: texts of different lengths, no pictures, one question."""

    def __init__(self, texts, longest):
        self.texts, self.longest = texts, longest
        self.views, self.image_size = ("text",), (8, 8)

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return self.texts[index]

    def render(self, record, view, rng):
        return Example(record, None, None, ("about?",), ("red",), ("topic",), (False,))

    def streams(self, view):
        return ("text",)

    def complete(self, view):
        return False

    def paired(self, view):
        return False

    def answer_length(self, tokenizer):
        return 1

    def text_lengths(self, view, tokenizer):
        return 0, self.longest

    def question_length(self, tokenizer):
        return 20

    def answers(self):
        yield from ()


def test_ragged_texts_of_any_source_are_padded_and_masked(dataset):
    source = Captions(["red", "red circle at 12 .", ""], longest=7)
    config = DataConfig(batch_size=3, stages=[[0, {"text": 1.0}]])
    batch: Any = next(training_batches(source, dataset.tokenizer, config))[1]
    lengths = sorted(len(dataset.tokenizer.encode(text)) for text in source.texts)
    assert sorted(batch.inputs.text_mask.sum(-1)) == lengths == [0, 1, 5]
    np.testing.assert_array_equal(
        batch.inputs.text_mask, batch.inputs.text != dataset.tokenizer.pad_id
    )
    assert batch.inputs.text.shape == (3, 7) and batch.tokens.shape == (3, 1, 22)


def test_a_text_longer_than_its_source_promised_is_an_error(dataset):
    source = Captions(["red circle at 12 ."], longest=3)
    with pytest.raises(ValueError, match="5 tokens, and its source promised at most 3"):
        next(evaluation_batches(source, dataset.tokenizer, "text", 1, seed=0))


def test_a_small_vocabulary_still_fits_its_promised_lengths(dataset):
    tokenizer = Tokenizer.train(dataset.train.corpus(), 280)
    least, most = dataset.train.text_lengths("text", tokenizer)
    for found in evaluation_batches(dataset.train, tokenizer, "text", 64, seed=0):
        mask: Any = found.batch.inputs.text_mask
        lengths = mask.sum(-1)
        assert least <= lengths.min() and lengths.max() <= most


# --- Configuration


def test_views_follow_the_rates_in_force():
    rates = {"image": 3.0, "text": 1.0, "aux": 0.0}
    config = DataConfig(stages=((0, {"aux": 0.1}), (100, rates), (1100, {"split_image_aux": 2})))
    views = [config.view(step) for step in range(1200)]
    assert set(views[:100]) == {"aux"} and set(views[1100:]) == {"split_image_aux"}
    assert set(views[100:1100]) == {"image", "text"}
    assert 0.70 < views[100:1100].count("image") / 1000 < 0.80
    assert config.views == ("image", "text", "aux", "split_image_aux")


def test_config_survives_json_and_config_dict():
    config = DataConfig(stages=((0, {"text": 1.0, "aux": 2.0}), (5, {"image": 1.0})))
    fields: dict[str, Any] = dataclasses.asdict(config)
    again = DataConfig(**json.loads(json.dumps(fields)))
    config_dict: Any = ml_collections.ConfigDict(fields)
    through = DataConfig(**json.loads(config_dict.to_json_best_effort()))
    direct = DataConfig(**config_dict)
    reordered = DataConfig(stages=[[0, {"aux": 2, "text": 1}], [5, {"image": 1}]])
    assert config == again == through == direct
    steps = range(50)
    assert [config.view(s) for s in steps] == [reordered.view(s) for s in steps]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"batch_size": 0}, "batch_size is 0.*at least 1"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
        ({"stages": []}, "stages begin at steps .*begin at 0"),
        ({"stages": [[5, {"text": 1}]]}, "stages begin at steps .*begin at 0"),
        ({"stages": [[0, {"text": 1}], [0, {"aux": 1}]]}, "must begin at 0 and increase"),
        (
            {"stages": [[0, {"txt": 1}]]},
            r"stages\[0\]: training has no view 'txt'; did you mean 'text'",
        ),
        (
            {"stages": [[0, {"split_image_text_only_text": 1}]]},
            "has no view 'split_image",
        ),
        ({"stages": [[0, {"text": -1}]]}, r"stages\[0\]: the rate of text is -1.*0 to 1e9"),
        ({"stages": [[0, {"text": float("nan")}]]}, "the rate of text is nan"),
        ({"stages": [[0, {"text": 0}]]}, "expected a view with a rate above 0"),
        ({"stages": [[0, "text"]]}, "must be .first step, .view: rate"),
        ({"stages": [0, {"text": 1}]}, "must be .first step, .view: rate"),
    ],
)
def test_a_bad_value_names_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize("name", ["clevr", "sort_of_clevr/huge"])
def test_an_unknown_data_set_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"data.name is '{name}'; use (one of )?sort_of_clevr"):
        prepare(DataConfig(name=name, data_dir=str(tmp_path)))


def test_a_model_of_another_image_size_is_refused_where_it_is_shown_images(tmp_path):
    model = SlamV3Config(vocab_size=1, image=ImageConfig(size=24))
    with pytest.raises(
        ValueError, match="model.image.size is 24; expected 75, the size of the pic"
    ):
        prepare(DataConfig("sort_of_clevr/tiny", str(tmp_path)), model=model)


def test_data_directory_comes_from_config_then_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SLAM_JAX_DATA_DIR", str(tmp_path))
    assert DataConfig().directory == tmp_path
    assert DataConfig(data_dir="/elsewhere").directory.as_posix() == "/elsewhere"
    monkeypatch.delenv("SLAM_JAX_DATA_DIR")
    assert DataConfig().directory.parts[-3:] == (".cache", "slam_jax", "tfds")


def test_two_processes_may_build_at_once(config, tmp_path, monkeypatch, capfd):
    config = dataclasses.replace(config, data_dir=str(tmp_path))
    generate = SortOfClevr._split_generators
    calls = []

    def slow(self, dl_manager):
        calls.append(1)
        if len(calls) == 1:
            prepare(config)  # the other process, faster
        return generate(self, dl_manager)

    monkeypatch.setattr(SortOfClevr, "_split_generators", slow)
    assert len(prepare(config).train) == 256 and len(calls) == 2
    prepare(config)
    out, err = capfd.readouterr()
    assert out == "" and len(calls) == 2
    assert err.splitlines() == [f"building sort_of_clevr/tiny (320 examples) in {tmp_path}"] * 2


def test_a_build_that_fails_says_so(config, tmp_path, monkeypatch):
    def full(self, dl_manager):
        raise OSError("disk full")

    monkeypatch.setattr(SortOfClevr, "_split_generators", full)
    with pytest.raises(DataError, match=r"could not be built \(disk full\); check free space"):
        prepare(dataclasses.replace(config, data_dir=str(tmp_path)))


# --- Damage


@pytest.fixture
def damaged(config, dataset, tmp_path):
    """The configuration of a copy of the data with damaged records: two for training, one test."""
    shutil.copytree(config.data_dir, tmp_path / "copy")
    config = dataclasses.replace(config, data_dir=str(tmp_path / "copy"))
    for split, places in (("train", (87_000, 131_072)), ("test", (5_000,))):
        (path,) = Path(config.data_dir).rglob(f"*-{split}.array_record*")
        content = bytearray(path.read_bytes())
        for place in places:
            content[place] ^= 1
        path.write_bytes(content)
    return config


def test_batches_are_made_without_damaged_records(config, dataset, damaged, caplog):
    found = prepare(damaged, dataset.tokenizer)
    bad = []
    for i in range(len(found.train)):
        try:
            found.train[i]
        except DamagedRecord:
            bad.append(i)
    assert len(bad) == 2
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        f"sort_of_clevr/tiny, train: record {i} is damaged and skipped" for i in bad
    ]
    steps = 2 * 256 // 8
    args = dataset.tokenizer, dataclasses.replace(config, stages=((0, {"aux": 1.0}),))
    whole = itertools.islice(training_batches(dataset.train, *args), steps)
    passed = itertools.islice(training_batches(found.train, *args), steps)
    others = 0
    for (_, a), (_, b) in zip(whole, passed, strict=True):
        same = np.all(a.tokens == b.tokens, axis=(1, 2)) & np.all(
            np.asarray(a.inputs.aux) == b.inputs.aux, axis=(1, 2)
        )
        others += int(np.sum(~same))
    assert others == 2 * 2  # two records in two epochs: each other example is what it was
    assert len(caplog.records) == 2  # told once

    def evaluated(data):
        made = evaluation_batches(data.test, dataset.tokenizer, "aux", 5, seed=0)
        return [example for batch in made for example in batch.examples]

    every, rest = evaluated(dataset), evaluated(found)
    assert (len(every), len(rest)) == (32, 31)
    prompts = [example.prompts for example in rest]
    assert sum(example.prompts not in prompts for example in every) == 1


def test_too_much_damage_ends_the_run(dataset, damaged):
    few = dataclasses.replace(damaged, max_damaged_records=1)
    assert not prepare(damaged).corpus_is_whole
    assert dataset.corpus_is_whole
    message = r"train: 2 damaged, more than data.max_damaged_records=1; record \d+: .*; repair"
    with pytest.raises(DataError, match=message):
        prepare(few)
    batches = training_batches(prepare(few, dataset.tokenizer).train, dataset.tokenizer, few)
    with pytest.raises(DataError, match=message):
        for _ in range(40):
            next(batches)


def test_a_source_of_which_nothing_can_be_read_ends_the_run(config, dataset):
    class Lost(Sequence):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise OSError("lost")

    source = Scenes(Records(Lost(), "lost", 10))
    with pytest.raises(DataError, match="all 3 records are damaged"):
        next(training_batches(source, dataset.tokenizer, config))


def test_a_data_set_that_cannot_be_opened_is_named(damaged):
    for path in Path(damaged.data_dir).rglob("dataset_info.json"):
        path.write_text("{")
    with pytest.raises(DataError, match=r"copy: sort_of_clevr/tiny cannot be read \(.*\); delete"):
        prepare(damaged)


def test_without_a_home_folder_another_place_is_asked_for(monkeypatch):
    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SLAM_JAX_DATA_DIR", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(ConfigError, match=r"there is no home folder; give data.data_dir or \$SLAM"):
        _ = DataConfig().directory
