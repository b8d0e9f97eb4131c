"""The handwritten digits of scikit-learn as a data set."""

import sys

import numpy as np
import pytest

from slam_jax.data import DataConfig, prepare, training_batches
from slam_jax.errors import ConfigError
from slam_jax.slam_v3 import ImageConfig, SlamV3Config

CONFIG = DataConfig(name="digits", vocab_size=300)
MODEL = SlamV3Config(vocab_size=1, image=ImageConfig(size=8, patch_size=1))


def test_every_digit_is_in_one_split_and_its_answer_is_its_name():
    from sklearn.datasets import load_digits

    dataset = prepare(CONFIG, model=MODEL)
    splits = [dataset.train, dataset.validation, dataset.test]
    assert [len(split) for split in splits] == [1257, 180, 360]
    images, digits = load_digits(return_X_y=True)
    expected = {
        (image.astype(np.uint8).tobytes(), str(digit))
        for image, digit in zip(images, digits, strict=True)
    }
    found = set()
    for split in splits:
        for i in range(len(split)):
            example = split.render(split[i], "image", np.random.default_rng(0))
            assert example.image is not None and example.prompts == ("digit",)
            grey = np.round(example.image[..., 0] / (255 / 16)).astype(np.uint8)
            found.add((grey.tobytes(), example.answers[0]))
    assert found == expected


def test_a_batch_has_an_image_and_a_question():
    dataset = prepare(CONFIG, model=MODEL)
    view, batch = next(training_batches(dataset.train, dataset.tokenizer, CONFIG))
    assert view == "image" and batch.inputs.image is not None
    assert batch.inputs.image.shape == (64, 8, 8, 3) and batch.inputs.image_mask is None
    assert batch.tokens.shape[:2] == (64, 1)


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"not installed: `pip install 'slam_jax\[digits\]'`"):
        prepare(CONFIG, model=MODEL)
