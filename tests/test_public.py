"""MNIST and COCO captions, read from small data sets with the same names and features."""

import dataclasses
import importlib.util
import io
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from slam_jax.data import (
    DataConfig,
    Row,
    Tokenizer,
    evaluation_batches,
    prepare,
    training_batches,
)
from slam_jax.data.public import with_fitting_answers
from slam_jax.data.records import DataError
from slam_jax.errors import ConfigError, InputError
from slam_jax.reporting.inspection import inspect_data
from slam_jax.slam_v3.config import SlamV3Config
from slam_jax.training import override, read_config, train

CONFIGS = Path(__file__).parents[1] / "configs"
CONTEXT = 24
TRAIN_PICTURES = 5_040
LONG = "and so it goes on " * 10
# Of each training picture, by its number; a grey level of 10 a number.
CAPTIONS = {
    0: ("level 0",),
    1: (" level 1 \n", "a grey of 1"),
    2: ("level 2", LONG + "2", "a grey of 2"),
    3: (LONG + "3", LONG * 2 + "3"),
    4: (),
    5: ("level 5 that is no picture",),
    **{i: tuple(f"level {i} by hand {j}" for j in range(5)) for i in range(6, 20)},
}


def encoded(pixels, kind):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return io.BytesIO(file.getvalue())


class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Grey pictures. Two pixels of the top row hold the number, the others 25 times the label."""

    VERSION = tfds.core.Version("3.0.1")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(28, 28, 1)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(TRAIN_PICTURES),
            "test": self._generate_examples(9),
        }

    def _generate_examples(self, count):
        for i in range(count):
            pixels = np.full((28, 28), i % 10 * 25, np.uint8)
            pixels[0, :2] = divmod(i, 256)
            yield i, {"image": encoded(pixels, "png"), "label": i % 10}


class CocoCaptions(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """`CAPTIONS` for training, and four pictures in each other split."""

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="2014")]

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(
                {
                    "id": np.int64,
                    "area": np.int64,
                    "bbox": tfds.features.BBoxFeature(),
                    "label": tfds.features.ClassLabel(num_classes=80),
                    "is_crowd": np.bool_,
                }
            ),
            "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        others = {split: self._generate_examples(range(8, 12)) for split in ("val", "test")}
        return {"train": self._generate_examples(CAPTIONS), **others}

    def _generate_examples(self, numbers):
        for i in numbers:
            picture = encoded(np.full((40 + i, 60, 3), 10 * i, np.uint8), "jpeg")
            box = tfds.features.BBox(0.0, 0.0, 0.5, 0.5)
            thing = {"id": i, "area": 9, "bbox": box, "label": 3, "is_crowd": False}
            captions = [{"text": text, "id": j} for j, text in enumerate(CAPTIONS[i])]
            yield (
                i,
                {
                    "image": io.BytesIO(b"none") if i == 5 else picture,
                    "image/filename": f"{i}.jpg",
                    "image/id": i,
                    "objects": [thing] * (i % 3),
                    "captions": captions,
                },
            )


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    for builder in (Mnist, CocoCaptions):
        made: Any = builder(data_dir=folder, file_format="array_record")
        made.download_and_prepare()
    return folder


@pytest.fixture
def no_tensorflow(monkeypatch):
    """TensorFlow is not found, even if it is installed, and importing it is an error."""

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == "tensorflow":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find_spec(name)
    )


def model(**changes):
    return SlamV3Config.preset("tiny", 1, context_length=CONTEXT, **changes)


def config_of(name, directory, **changes):
    settings = {"batch_size": 8, "vocab_size": 400, "seed": 1, **changes}
    return DataConfig(name, data_dir=str(directory), **settings)


def next_batch(batches) -> Any:
    view, batch = next(batches)
    assert view == "image"
    return batch


def answer_of(tokenizer, batch, i):
    start, end = batch.prompt_length[i, 0], batch.length[i, 0]
    assert batch.tokens[i, 0, 0] == tokenizer.bos_id
    assert batch.tokens[i, 0, end - 1] == tokenizer.eos_id
    return tokenizer.decode(batch.tokens[i, 0, 1:start]), tokenizer.decode(
        batch.tokens[i, 0, start:end]
    )


def every_example(source, tokenizer):
    made = evaluation_batches(source, tokenizer, "image", 8, seed=0)
    return [example for batch in made for example in batch.examples]


# --- MNIST


@pytest.mark.release
def test_the_last_5000_digits_of_the_training_split_are_set_aside(directory, no_tensorflow):
    dataset = prepare(config_of("mnist", directory), model=model(image={"size": 28}))

    def numbers(source):
        pictures = (source[i].image for i in range(len(source)))
        return [256 * int(p[0, 0, 0]) + int(p[0, 1, 0]) for p in pictures]

    split = [numbers(source) for source in (dataset.train, dataset.validation, dataset.test)]
    assert list(map(len, split)) == [TRAIN_PICTURES - 5_000, 5_000, 9]
    assert sorted(split[0] + split[1]) == list(range(TRAIN_PICTURES))
    assert sorted(split[2]) == list(range(9))


def test_the_answer_to_a_digit_is_its_label(directory, no_tensorflow):
    config = config_of("mnist", directory)
    dataset = prepare(config, model=model(image={"size": 28}))
    batches = training_batches(dataset.train, dataset.tokenizer, config)
    for _ in range(4):
        batch = next_batch(batches)
        assert batch.inputs.image.shape == (8, 28, 28, 3)
        assert batch.tokens.shape == (8, 1, dataset.train.question_length(dataset.tokenizer) + 2)
        for i in range(8):
            digit = int(batch.inputs.image[i, -1, -1, 0]) // 25
            assert answer_of(dataset.tokenizer, batch, i) == ("digit", str(digit))
    for example in every_example(dataset.test, dataset.tokenizer):
        assert example.image is not None
        assert example.answers == (str(int(example.image[-1, -1, 0]) // 25),)


# --- COCO


def test_captions_are_answers_about_their_own_picture(directory, no_tensorflow):
    config = config_of("coco_captions", directory)
    dataset = prepare(config, model=model())
    assert len(dataset.train) == len(CAPTIONS)
    assert (len(dataset.validation), len(dataset.test)) == (4, 4)
    drawn = {i: set() for i in CAPTIONS}
    batches = training_batches(dataset.train, dataset.tokenizer, config)
    for _ in range(120):
        batch = next_batch(batches)
        assert batch.tokens.shape == (8, 1, CONTEXT)
        for i in range(8):
            prompt, answer = answer_of(dataset.tokenizer, batch, i)
            level = int(batch.inputs.image[i, 12, 12, 0])
            assert prompt == "caption"
            drawn[round(level / 10)].add(answer)
    stripped = {i: {text.strip() for text in texts} for i, texts in CAPTIONS.items()}
    short = {i: {text for text in texts if LONG not in text} for i, texts in stripped.items()}
    assert drawn == {**short, 5: set()}
    assert drawn[2] and not drawn[3]
    examples = every_example(dataset.test, dataset.tokenizer)
    assert sorted(e.answers[0].split()[1] for e in examples) == ["10", "11", "8", "9"]
    assert {"level 2", "a grey of 1", "level 19 by hand 4"} <= set(dataset.train.answers())


def test_pictures_without_a_fitting_caption_are_skipped_with_a_warning(directory, caplog):
    config = config_of("coco_captions", directory, max_damaged_records=3)
    dataset = prepare(config, model=model())
    assert not dataset.corpus_is_whole
    caplog.clear()
    examples = every_example(dataset.train, dataset.tokenizer)
    assert len(examples) == len(CAPTIONS) - 3
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert f"(3.jpg: none of its 2 answers has at most {CONTEXT - 3} tokens" in told
    assert f"model.context_length is {CONTEXT})" in told
    assert "(4.jpg: it has no caption)" in told
    assert "(5.jpg, image: the picture is no picture of a known kind" in told
    with pytest.raises(DataError, match="3 damaged, more than data.max_damaged_records=2"):
        every_example(
            prepare(dataclasses.replace(config, max_damaged_records=2), model=model()).train,
            dataset.tokenizer,
        )


def test_a_row_whose_text_does_not_fit_is_refused_by_itself():
    tokenizer = Tokenizer.train(["a"], 262)
    rows = [Row(None, "a" * length, None, "", ("a",), where="row 1") for length in (CONTEXT, 40)]
    fitting = with_fitting_answers(rows, tokenizer, CONTEXT)
    assert fitting[0] == rows[0]
    longer = with_fitting_answers([rows[0]._replace(text="a" * (CONTEXT + 1))], tokenizer, CONTEXT)
    with pytest.raises(
        InputError, match=f"its text has {CONTEXT + 1} tokens; .*length is {CONTEXT}"
    ):
        longer[0]


def test_with_the_tokenizer_of_a_checkpoint_captions_are_measured_by_it(directory):
    config = config_of("coco_captions", directory)
    trained = prepare(config, model=model())
    coarse = prepare(dataclasses.replace(config, vocab_size=275), model=model())
    for tokenizer in (trained.tokenizer, coarse.tokenizer):
        dataset = prepare(config, tokenizer, model=model())
        assert dataset.tokenizer is tokenizer
        for example in every_example(dataset.train, tokenizer):
            tokens = [len(tokenizer.encode(t)) for t in (*example.prompts, *example.answers)]
            assert sum(tokens) + 2 <= CONTEXT
    assert prepare(config, model=model()).tokenizer == trained.tokenizer


def test_captions_can_be_inspected(directory):
    found = inspect_data(config_of("coco_captions", directory), model())
    assert found.num_examples == len(found.tiles) == len(CAPTIONS) - 3
    assert found.shapes["image"] == {"tokens": f"8x1x{CONTEXT}", "image": "8x24x24x3"}
    assert {tile.prompt for tile in found.tiles} == {"caption"}


# --- Where they cannot be had


@pytest.mark.parametrize("name", ["mnist", "coco_captions"])
def test_without_tensorflow_a_set_that_is_not_there_gives_one_line(name, tmp_path, no_tensorflow):
    folder = tmp_path / {"mnist": "mnist", "coco_captions": "coco_captions/2014"}[name]
    cut_short = folder / "incomplete.ABC_1.0.0"
    cut_short.mkdir(parents=True)
    (cut_short / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError) as caught:
        prepare(config_of(name, tmp_path))
    assert str(caught.value) == (
        f"{folder} is not there, and TFDS needs TensorFlow to build it: `pip install tensorflow`, "
        "which nothing else needs, or copy it from where TFDS built it with "
        "file_format='array_record'"
    )


@pytest.mark.parametrize("reason", ["no route", "No space left on device"])
def test_a_failed_build_says_what_to_do(reason, tmp_path, monkeypatch, capsys):
    class Builder:
        data_path = tmp_path / "mnist" / "3.0.1"

        def download_and_prepare(self, download_config):
            raise OSError(28, reason)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "installed")
    monkeypatch.setattr(tfds, "builder", lambda name, **settings: Builder())
    message = rf"built \({reason}\); check the network, free space and permissions, or copy it from"
    with pytest.raises(DataError, match=message):
        prepare(config_of("mnist", tmp_path))


def test_a_set_that_is_not_kept_by_index_is_named(directory, tmp_path):
    shutil.copytree(directory / "mnist", tmp_path / "mnist")
    for path in (tmp_path / "mnist").rglob("*.array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    with pytest.raises(DataError, match=r"mnist has no array_record files, .* have TFDS build it"):
        prepare(config_of("mnist", tmp_path))


def test_a_set_without_variants_takes_none(directory):
    for name in ("mnist/large", "coco_captions/2017", "digits/8"):
        with pytest.raises(ConfigError, match=f"data.name is '{name}'; use one of"):
            prepare(config_of(name, directory))


# --- Their configurations


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "coco_captions"])
def test_the_configuration_trains(name, directory, tmp_path):
    small = {
        "data.data_dir": str(directory),
        "data.batch_size": 4,
        "model.embed_dim": 16,
        "model.num_heads": 2,
        "model.mlp_dim": 16,
        "model.kv_lora_rank": 8,
        "model.num_process_layers": 1,
        "model.num_decoder_layers": 1,
        "model.image.num_layers": 1,
        "model.image.stage_widths": [8, 8],
        "run.num_steps": 2,
        "run.evaluate_batches": 1,
    }
    config = read_config(CONFIGS / f"slam_v3_{name}.py")
    config = override(config, [f"--config.{field}={value}" for field, value in small.items()])
    assert int(train(config, tmp_path / "run").step) == 2
