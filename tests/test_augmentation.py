"""How pictures become square, and how those of training examples are changed at random."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slam_jax.data import DataConfig, evaluation_batches, prepare, training_batches
from slam_jax.data.augmentation import augment, change_colours
from slam_jax.data.images import RESIZE_POLICIES, load_image
from slam_jax.errors import ConfigError
from slam_jax.slam_v3 import ImageConfig, SlamV3Config
from slam_jax.training import Loaded
from slam_jax.vision_models import Preprocessing, VisionConfig

GREY = (128, 128, 128)
SIZE = 16
MODEL = SlamV3Config(vocab_size=1, image=ImageConfig(size=SIZE, stage_widths=(8,)))
PLAIN = DataConfig()


def thirds() -> Image.Image:
    """Red, green and blue thirds, from left to right, of a picture thrice as wide as it is high."""
    pixels = np.zeros((40, 120, 3), np.uint8)
    for i in range(3):
        pixels[:, 40 * i : 40 * (i + 1), i] = 200
    return Image.fromarray(pixels)


@pytest.mark.parametrize("upright", [False, True])
def test_a_policy_decides_what_is_seen_of_a_picture(upright):
    image = thirds().transpose(Image.Transpose.ROTATE_270) if upright else thirds()

    def seen(policy: str | None) -> np.ndarray:
        pixels = load_image(image, 24, policy)
        return pixels.swapaxes(0, 1) if upright else pixels

    crop, stretch, letterbox = seen("crop"), seen("stretch"), seen("letterbox")
    assert (crop[:, 3:-3] == (0, 200, 0)).all()
    for i, colour in enumerate(((200, 0, 0), (0, 200, 0), (0, 0, 200))):
        place = slice(8 * i + 3, 8 * i + 6)
        assert (stretch[:, place] == colour).all()
        assert (letterbox[9:15, place] == colour).all()
    assert (letterbox[:8] == GREY).all() and (letterbox[16:] == GREY).all()
    np.testing.assert_array_equal(seen(None), letterbox)


@pytest.mark.parametrize("policy", RESIZE_POLICIES)
def test_a_square_picture_is_the_same_by_every_policy(policy):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    expected = image.resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(load_image(image, 24, policy), expected)


def test_a_crop_is_the_centre_of_the_scaled_picture():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 96, 3), np.uint8))
    scaled = image.resize((48, 24), Image.Resampling.BICUBIC)
    expected = np.asarray(scaled)[:, 12:36].astype(int)
    np.testing.assert_allclose(load_image(image, 24, "crop").astype(int), expected, atol=1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("resize", "squash", "resize is 'squash'; expected one of letterbox, crop, stretch"),
        ("flip", 1.5, "flip is 1.5; expected a number from 0"),
        ("colour", -0.1, "colour is -0.1; expected a number from 0"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**{field: value})


def pixels_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def augmented(pictures: list[np.ndarray], seed: int = 0, **fields: Any) -> list[np.ndarray]:
    config = dataclasses.replace(PLAIN, **fields)
    return augment(pictures, config, np.random.default_rng(seed))


def test_nothing_is_changed_and_nothing_drawn_by_default():
    rng = np.random.default_rng(3)
    [same] = augment([pixels_of(0)], PLAIN, rng)
    np.testing.assert_array_equal(same, pixels_of(0))
    assert rng.random() == np.random.default_rng(3).random()


def test_pictures_are_mirrored_together_at_the_rate_of_the_config():
    pictures, mirrored = [pixels_of(0), pixels_of(1)], 0
    for seed in range(200):
        both = augmented(pictures, seed, flip=0.25)
        flipped = [(x == y[:, ::-1]).all() for x, y in zip(both, pictures, strict=True)]
        kept = [(x == y).all() for x, y in zip(both, pictures, strict=True)]
        assert all(flipped) != all(kept) and any(flipped) == all(flipped)
        mirrored += all(flipped)
    assert 30 <= mirrored <= 70
    [always] = augmented(pictures[:1], flip=1.0)
    np.testing.assert_array_equal(always, pictures[0][:, ::-1])


def test_colours_change_by_the_factors_that_their_names_say():
    pixels = np.full((4, 4, 3), (100, 50, 25), np.uint8)
    pixels[2:] = (50, 25, 0)
    np.testing.assert_array_equal(change_colours(pixels, 1.0, 1.0, 1.0), pixels)
    np.testing.assert_allclose(change_colours(pixels, 0.5, 1.0, 1.0), pixels // 2, atol=1)
    np.testing.assert_array_equal(change_colours(pixels, 2.0, 1.0, 1.0), 2 * pixels)
    flat = change_colours(pixels, 1.0, 0.0, 1.0)
    grey = np.asarray(Image.fromarray(pixels).convert("L")).astype(int)
    assert (flat == flat[0, 0, 0]).all() and abs(int(flat[0, 0, 0]) - grey.mean()) < 1
    without = change_colours(pixels, 1.0, 1.0, 0.0)
    np.testing.assert_array_equal(without, np.repeat(grey[..., None], 3, -1))


def test_colours_vary_within_the_strength_and_alike_for_all_pictures():
    flat = np.full((4, 4, 3), 100, np.uint8)
    found = []
    for seed in range(100):
        one, other = augmented([flat, flat], seed, colour=0.2)
        np.testing.assert_array_equal(one, other)
        found.append(int(one[0, 0, 0]))
    assert 79 <= min(found) < 90 and 110 < max(found) <= 121


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, rows = tmp_path_factory.mktemp("own"), []
    for i in range(12):
        Image.fromarray(pixels_of(i)).resize((30, 20)).save(folder / f"{i}.png")
        split = ("train", "validation", "test")[max(0, i - 9)]
        rows.append({"image": f"{i}.png", "answer": "a", "split": split})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def config(folder: Path, **fields: Any) -> DataConfig:
    stages = ((0, {"image": 1.0}),)
    given = dict(batch_size=4, stages=stages, vocab_size=300, table_version=2)
    return DataConfig(name="folder", path=str(folder), **{**given, **fields})


CHANGES: dict[str, Any] = dict(augment=0.3, flip=0.5, colour=0.3, seed=7)


def test_a_training_picture_depends_on_seed_step_and_row_alone(folder):
    def batches(start: int, rows: Any = None, **fields: Any) -> list[Any]:
        data = config(folder, **{**CHANGES, **fields})
        dataset = prepare(data, model=MODEL)
        made = training_batches(dataset.train, dataset.tokenizer, data, start_step=start, rows=rows)
        return [next(made)[1].inputs.image for _ in range(4)]

    first = batches(0)
    np.testing.assert_array_equal(batches(2)[0], first[2])
    np.testing.assert_array_equal(batches(0, [1, 3])[1], first[1][[1, 3]])
    assert (batches(0, seed=8)[0] != first[0]).any()
    # In another epoch the same pictures look different.
    assert len({image.tobytes() for batch in first for image in batch}) == 16


def test_pictures_of_the_other_splits_are_not_changed_but_resized_by_the_policy(folder):
    dataset = prepare(config(folder, resize="crop", **CHANGES), model=MODEL)
    for source, name in ((dataset.validation, "10.png"), (dataset.test, "11.png")):
        [batch] = evaluation_batches(source, dataset.tokenizer, "image", 1, seed=0)
        expected = load_image(folder / name, SIZE, "crop")
        inputs: Any = batch.batch.inputs
        np.testing.assert_array_equal(inputs.image[0], expected)


@pytest.mark.parametrize("field", ["flip", "colour"])
def test_scenes_refuse_what_would_change_their_answers(field):
    with pytest.raises(ConfigError, match=f"{field} is 0.5; expected 0 for sort_of_clevr"):
        prepare(dataclasses.replace(PLAIN, **{field: 0.5}))


def test_a_vision_tower_keeps_its_own_preprocessing_and_a_note_says_so(folder, caplog):
    sizes: dict[str, Any] = dict(
        image_size=16, patch_size=8, embed_dim=16, mlp_dim=16, num_layers=1, num_heads=2
    )
    tower = VisionConfig(model_type="vit", **sizes)
    how = Preprocessing(size=(SIZE, SIZE))
    image = ImageConfig(size=SIZE, tower=tower, preprocessing=how)
    model = SlamV3Config(vocab_size=1, image=image)
    with caplog.at_level(logging.WARNING, "slam_jax"):
        dataset = prepare(config(folder, resize="crop"), model=model)
    [note] = dataset.notes
    assert note.startswith("data.resize=crop is not used; the vision tower") and note in caplog.text
    expected = load_image(folder / "11.png", SIZE, how)
    np.testing.assert_array_equal(dataset.test[0].image, expected)
    assert not prepare(config(folder), model=model).notes


def test_a_checkpoint_without_the_field_means_the_letterbox():
    old: Any = Loaded(None, None, None, {"data": {"name": "folder"}}, 1)  # type: ignore[arg-type]
    assert old.resize == "letterbox"
