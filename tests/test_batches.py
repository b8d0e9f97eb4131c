"""Batches of texts of many lengths, and batches that are made in worker processes."""

import dataclasses
import itertools
import multiprocessing
import shutil
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
from helpers import assert_same
from PIL import Image
from test_folder import config, write

from slam_jax.data import DataConfig, evaluation_batches, prepare, training_batches
from slam_jax.data.records import DataError
from slam_jax.slam_v3 import ImageConfig, SlamV3Config

MODEL = SlamV3Config(vocab_size=1, image=ImageConfig(size=16))
NUM_ROWS, DAMAGED = 40, 3


@pytest.fixture(scope="module")
def ragged(tmp_path_factory) -> Path:
    """Texts of 1 to 40 words, each with a picture."""
    folder, rows = tmp_path_factory.mktemp("data") / "ragged", []
    folder.mkdir()
    for i in range(NUM_ROWS):
        Image.new("RGB", (20, 30), (5 * i, 0, 0)).save(folder / f"{i}.png")
        words, split = " ".join(["a b c d"[i % 4 :]] * (1 + i)), "train" if i > 1 else "test"
        row = {"image": f"{i}.png", "text": words, "prompt": "n?", "answer": f"{i}", "split": split}
        rows.append(row | {"split": "validation"} if i == 1 else row)
    return write(folder, rows)


@pytest.fixture(scope="module")
def damaged(ragged, tmp_path_factory) -> Path:
    """The same, with a picture of a short text that is cut off."""
    folder = tmp_path_factory.mktemp("damaged") / "ragged"
    shutil.copytree(ragged, folder)
    cut_off(folder / f"{DAMAGED}.png")
    return folder


def cut_off(picture: Path) -> None:
    picture.write_bytes(picture.read_bytes()[:-25])


def settings(folder: Path, **fields: Any) -> DataConfig:
    stages = ((0, {"image_text": 1.0}),)
    fields = {"bucket_lengths": True, "batch_size": 2, "stages": stages, **fields}
    return config(folder, max_damaged_records=1, **fields)


def take(config: DataConfig, count: int, **kwargs: Any) -> list[Any]:
    dataset = prepare(config, model=MODEL)
    batches: Any = training_batches(dataset.train, dataset.tokenizer, config, **kwargs)
    try:
        return [batch for _, batch in itertools.islice(batches, count)]
    finally:
        batches.close()


def test_texts_are_padded_to_the_next_power_of_two(ragged):
    bucketed = take(settings(ragged, batch_size=1), 38)
    padded = take(settings(ragged, batch_size=1, bucket_lengths=False), 38)
    longest = padded[0].inputs.text.shape[1]
    shapes = set()
    for few, many in zip(bucketed, padded, strict=True):
        size, length = few.inputs.text.shape[1], few.inputs.text_mask.sum(-1).max()
        shapes.add(size)
        assert size == min(longest, max(16, 2 ** int(np.ceil(np.log2(length)))))
        assert_same(few.inputs.text, many.inputs.text[:, :size])
        assert_same(few.inputs.text_mask, many.inputs.text_mask[:, :size])
        # Questions are shorter than the shortest bucket.
        assert_same(
            (few.inputs.image, few.tokens, few.length),
            (many.inputs.image, many.tokens, many.length),
        )
    assert len(shapes) > 2 and 16 in shapes and longest in shapes


def test_questions_are_padded_to_the_next_power_of_two(tmp_path):
    rows = [{"text": f"t{i}", "prompt": "p " * (3 * i), "answer": "a"} for i in range(12)]
    own = settings(write(tmp_path, rows), batch_size=1, stages=((0, {"text": 1.0}),))
    bucketed, padded = (
        take(dataclasses.replace(own, bucket_lengths=value), 20) for value in (True, False)
    )
    for few, many in zip(bucketed, padded, strict=True):
        size, length = few.tokens.shape[-1], few.length.max()
        assert size == min(many.tokens.shape[-1], max(16, 2 ** int(np.ceil(np.log2(length)))))
        assert_same(few.tokens, many.tokens[..., :size])


def test_every_host_pads_alike(damaged):
    own = settings(damaged, batch_size=4)
    whole = take(own, 30)
    hosts = (take(own, 30, rows=range(2 * host, 2 * host + 2)) for host in (0, 1))
    for batch, *parts in zip(whole, *hosts, strict=True):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        size = batch.inputs.text.shape[1]
        # The record in place of the damaged one may be shorter.
        assert joined.inputs.text.shape[1] >= size
        assert_same(joined.inputs.text[:, :size], batch.inputs.text)
        assert_same((joined.inputs.image, joined.tokens), (batch.inputs.image, batch.tokens))


def test_a_damaged_record_is_replaced_by_one_that_is_no_longer(damaged):
    dataset = prepare(settings(damaged), model=MODEL)
    tokenizer, source = dataset.tokenizer, cast(Any, dataset.train)
    lost = next(i for i, row in enumerate(source.rows) if row.image.stem == str(DAMAGED))
    bound = source.lengths(lost, tokenizer)
    # Each record once an epoch, one a batch.
    batches = take(settings(damaged, batch_size=1), len(source))
    lengths = sorted(int(batch.inputs.text_mask.sum()) for batch in batches)
    records = [source.lengths(i, tokenizer).text for i in range(len(source))]
    records.remove(bound.text)
    for length in records:
        lengths.remove(length)
    assert len(lengths) == 1 and lengths[0] <= 16


def test_evaluation_pads_to_the_longest(ragged):
    dataset = prepare(settings(ragged), model=MODEL)
    found: Any = next(evaluation_batches(dataset.test, dataset.tokenizer, "image_text", 1, seed=0))
    assert (
        found.batch.inputs.text.shape[1] == dataset.test.text_lengths("text", dataset.tokenizer)[1]
    )


@pytest.mark.release
def test_worker_processes_make_the_same_batches_and_end(ragged):
    threads = take(settings(ragged), 8, start_step=2)
    workers = take(settings(ragged, workers=2), 8, start_step=2)
    assert_same(workers, threads)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_an_error_in_a_worker_process_is_that_of_the_data(ragged, tmp_path):
    shutil.copytree(ragged, tmp_path / "own")
    own = settings(tmp_path / "own", workers=1)
    dataset = prepare(own, model=MODEL)
    for picture in (tmp_path / "own").glob("?.png"):
        cut_off(picture)
    batches: Any = training_batches(dataset.train, dataset.tokenizer, own)
    with pytest.raises(DataError, match="more than data.max_damaged_records=1"):
        for _ in range(40):
            next(batches)
    batches.close()
