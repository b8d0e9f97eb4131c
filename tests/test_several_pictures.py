"""Several pictures an example: in the model, in data, in requests, and in what reports show."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from test_ask import ask
from test_generation import make_loaded, picture
from test_slam_v3 import (
    LENGTH,
    TOKENS,
    close,
    decode,
    decode_step,
    encode,
    forward,
    logits_and_gradients,
    prefill,
)

from slam_jax.data import DataConfig, evaluation_batches, prepare
from slam_jax.data.pipeline import Source
from slam_jax.data.records import DataError
from slam_jax.errors import InputError
from slam_jax.generation import Request, Sampling, generate
from slam_jax.generation.requests import read_inputs
from slam_jax.interop import load_preprocessing, load_vision
from slam_jax.reporting.attention import attention_html, attention_maps
from slam_jax.reporting.checkpoint import evaluate_checkpoint
from slam_jax.reporting.inspection import inspect_data
from slam_jax.reporting.report import render_report
from slam_jax.slam_v3 import ImageConfig, Inputs, SlamV3, SlamV3Config
from slam_jax.training import default_config, load, train

pytestmark = pytest.mark.release

THREE = ImageConfig(size=12, stage_widths=(8,), max_images=3)
SIGLIP = Path(__file__).parent / "goldens" / "vision" / "siglip_vision"


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """[2, count, 12, 12, 3], the same first ones whatever the count."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, 256, (2, 12, 12, 3), np.uint8) for _ in range(count)], axis=1)


def shown(mask: Any) -> np.ndarray:
    return np.array(mask, bool)


@pytest.fixture(scope="module")
def model(build) -> SlamV3:
    return build(image=THREE)


@pytest.fixture(scope="module")
def given(make_inputs) -> Any:
    """Two examples with a text: the first has two pictures, the second one."""
    inputs = dataclasses.replace(make_inputs(), aux=None, aux_mask=None)
    mask = shown([[1, 1, 0], [1, 0, 0]])
    return dataclasses.replace(inputs, image=pictures(3), image_mask=mask)


# --- The model


def test_pictures_that_are_masked_change_neither_logits_nor_gradients(model, given):
    logits, gradients = logits_and_gradients(model, TOKENS, given)
    other = given.image.copy()
    other[~given.image_mask] = 255 - other[~given.image_mask]
    for image, mask in ((other, given.image_mask), (given.image[:, :2], given.image_mask[:, :2])):
        inputs = dataclasses.replace(given, image=image, image_mask=mask)
        same, same_gradients = logits_and_gradients(model, TOKENS, inputs)
        close(same, logits, 1e-6)
        largest = max(np.abs(x).max() for x in jax.tree.leaves(gradients))
        for a, b in zip(*map(jax.tree.leaves, (same_gradients, gradients)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * largest)
    changed = given.image.copy()
    changed[0, 1] = 255 - changed[0, 1]
    moved = forward(model, TOKENS, dataclasses.replace(given, image=changed)) - logits
    assert np.abs(moved[0]).max() > 1e-4 and np.abs(moved[1]).max() < 1e-6


def test_one_picture_alone_is_the_first_of_several(model, given):
    alone = dataclasses.replace(given, image=given.image[:, 0], image_mask=None)
    first = dataclasses.replace(given, image_mask=shown([[1, 0, 0]] * 2))
    close(forward(model, TOKENS, alone), forward(model, TOKENS, first), 1e-6)
    absent = dataclasses.replace(alone, image_mask=shown([1, 0]))
    nothing = dataclasses.replace(given, image_mask=shown([[1, 0, 0], [0, 0, 0]]))
    close(forward(model, TOKENS, absent), forward(model, TOKENS, nothing), 1e-6)


def test_the_order_of_pictures_is_that_of_their_embeddings(model, given):
    order = np.array([1, 0, 2])
    swapped = dataclasses.replace(
        given, image=given.image[:, order], image_mask=given.image_mask[:, order]
    )
    before, after = forward(model, TOKENS, given), forward(model, TOKENS, swapped)
    assert np.abs(after - before).max() > 1e-4
    changed = nnx.clone(model)
    changed.streams.image_index[...] = model.streams.image_index[...][order]
    close(forward(changed, TOKENS, swapped), before, 1e-5)


def test_a_model_of_one_picture_has_no_more_parameters_and_takes_one_either_way(build, given):
    model = build(image=dataclasses.replace(THREE, max_images=1))
    assert not hasattr(model.streams, "image_index")
    alone = dataclasses.replace(given, image=given.image[:, 0], image_mask=shown([1, 0]))
    listed = dataclasses.replace(given, image=given.image[:, :1], image_mask=shown([[1], [0]]))
    np.testing.assert_array_equal(forward(model, TOKENS, alone), forward(model, TOKENS, listed))
    with pytest.raises(InputError, match="3 pictures an example, expected at most image.max_im"):
        jax.eval_shape(model.encode, given)
    with pytest.raises(InputError, match=r"image_mask is \[2\]; expected \[2, 3\]"):
        jax.eval_shape(model.encode, dataclasses.replace(given, image_mask=shown([1, 1])))


def test_steps_with_a_cache_give_the_logits_of_the_whole(model, given):
    tokens, memory = TOKENS[:, 0], encode(model, given)
    full = decode(model, tokens, memory)
    logits, cache = prefill(model, tokens[:, :3], model.init_cache((2,), LENGTH), memory)
    close(logits, full[:, :3])
    for step in range(3, LENGTH):
        logits, cache = decode_step(model, tokens[:, step], cache, memory)
        close(logits, full[:, step])


@pytest.mark.parametrize("kind", ["vit", "pretrained"])
def test_other_encoders_read_each_picture_alone(build, given, kind):
    image = ImageConfig("vit", size=12, patch_size=4, num_layers=1, max_images=2)
    if kind == "pretrained":
        fields: dict[str, Any] = dict(
            tower=load_vision(SIGLIP)[1], preprocessing=load_preprocessing(SIGLIP)
        )
        image = ImageConfig(size=24, max_images=2, **fields)
    model = build(image=image)
    size = image.size
    image = np.random.default_rng(0).integers(0, 256, (2, 2, size, size, 3), np.uint8)

    @jax.jit
    def tokens(image):
        return model.streams(Inputs(image=image), None)[0].tokens

    both, other = tokens(image), tokens(np.concatenate([image[:, :1], 255 - image[:, 1:]], axis=1))
    count = both.shape[1] // 2
    close(both[:, :count], other[:, :count], 1e-6)
    assert (np.abs(both[:, count:] - other[:, count:]).max(axis=-1) > 1e-4).all()
    close(tokens(image[:, 0]), both[:, :count], 1e-5)


# --- Data: which of two pictures is brighter?


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rng, rows = np.random.default_rng(0), []
    for i in range(32):
        Image.new("L", (6, 9), 8 * i).save(folder / f"{i}.png")
    for i in range(160):
        a, b = rng.choice(32, 2, replace=False).tolist()
        split = "train" if i < 128 else "validation" if i < 144 else "test"
        answer = "first" if a > b else "second"
        row = {"image": [f"{a}.png", f"{b}.png"], "prompt": "brighter?", "answer": answer}
        rows.append({**row, "split": split})
    rows.append({"image": ["3.png"], "prompt": "brighter?", "answer": "first", "split": "test"})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def data_config(folder: Path, **changes: Any) -> DataConfig:
    fields = dict(batch_size=4, stages=((0, {"image": 1.0}),), vocab_size=300, table_version=2)
    return DataConfig(name="folder", path=str(folder), **{**fields, **changes})


def model_config(most: int) -> SlamV3Config:
    return SlamV3Config(vocab_size=1, image=dataclasses.replace(THREE, max_images=most))


def last_batch(source: Source, tokenizer: Any) -> Any:
    return list(evaluation_batches(source, tokenizer, "image", 4, seed=0))[-1]


def test_a_batch_has_the_pictures_of_its_rows_and_a_mask(folder):
    dataset = prepare(data_config(folder), model=model_config(3))
    found = last_batch(dataset.test, dataset.tokenizer)
    inputs: Any = found.batch.inputs
    [example] = found.examples
    assert example.image is not None and example.image.shape == (1, 12, 12, 3)
    assert inputs.image.shape == (4, 3, 12, 12, 3)
    np.testing.assert_array_equal(inputs.image_mask, [[True, False, False]] * 4)
    assert (inputs.image[0, 0, :, 6] == 24).all() and not inputs.image[0, 1:].any()
    [first, *_] = evaluation_batches(dataset.test, dataset.tokenizer, "image", 4, seed=0)
    inputs = first.batch.inputs
    np.testing.assert_array_equal(inputs.image_mask, [[True, True, False]] * 4)
    row = dataset.test.rows[0]  # type: ignore[attr-defined]
    greys = [8 * int(path.stem) for path in row.image]
    np.testing.assert_array_equal(inputs.image[0, :2, 6, 6, 0], greys)


def test_rows_with_more_pictures_than_the_model_reads_are_named_before_training(folder):
    message = r"row 1: image: 2 pictures; the model reads at most model.image.max_images=1 \(and"
    with pytest.raises(DataError, match=message):
        prepare(data_config(folder, max_damaged_records=0), model=model_config(1))
    found = inspect_data(data_config(folder), model_config(3))
    assert not found.bad and found.shapes["image"]["image"] == "4x3x12x12x3, mask"
    assert found.tiles[0].image.shape == (12, 25, 3)  # side by side, with a line between them


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (["0.png", ""], "image: one of several is empty; leave it out of the list"),
        (["0.png", "none.png"], "none.png: no such file"),
        (["0.png", ["1.png"]], "image: a list; expected a text"),
    ],
)
def test_a_list_that_cannot_be_read_is_named(folder, image, message):
    rows = [
        *(folder / "data.jsonl").read_text().splitlines(),
        json.dumps({"image": image, "answer": "a"}),
    ]
    table = folder / "bad.jsonl"
    table.write_text("\n".join(rows))
    with pytest.raises(DataError, match=f"row 162: image: .*{message.removeprefix('image: ')}"):
        prepare(data_config(table, max_damaged_records=0), model=model_config(3))
    table.unlink()


# --- Requests, the report, the command


@pytest.fixture(scope="module")
def loaded() -> Any:
    return make_loaded(image=ImageConfig(size=24, stage_widths=(8, 16), max_images=4))


REQUESTS = [
    Request("circle", image=[picture(1), picture(2), picture(3)], seed=1),
    Request("circle", image=picture(1), seed=2),
    Request("circle", image=[picture(1)], seed=2),
    Request("circle", text="red", image=[], seed=3),
]


def test_requests_with_any_number_of_pictures_are_answered_alone_and_together(loaded):
    sampling = Sampling(max_new_tokens=6, temperature=1.0)
    inputs: Any = read_inputs(loaded, REQUESTS)
    assert inputs.image.shape == (4, 4, 24, 24, 3)  # three are filled up to a power of two
    assert inputs.image_mask.sum(axis=1).tolist() == [3, 1, 1, 0]
    together = generate(loaded, REQUESTS, sampling)
    alone = [generate(loaded, [request], sampling)[0] for request in REQUESTS]
    assert [x.samples[0].tokens for x in alone] == [x.samples[0].tokens for x in together]
    assert together[1].samples[0].tokens == together[2].samples[0].tokens
    assert len({x.samples[0].tokens for x in together}) == 3
    with pytest.raises(InputError, match="request 1: image: 5 pictures; the model reads at most"):
        generate(loaded, [REQUESTS[1], Request("circle", image=[picture(i) for i in range(5)])])


def test_each_picture_has_its_map(loaded):
    request = REQUESTS[0]
    maps = attention_maps(loaded, request, "yes")
    side = maps.image.shape[-1]  # type: ignore[union-attr]
    assert maps.image is not None and maps.image.shape == (len(maps.names), 3, side, side)
    np.testing.assert_allclose(maps.image.sum((1, 2, 3)), 1, atol=1e-4)
    two = attention_maps(loaded, Request("circle", image=list(request.image[:2])), "yes").image
    assert two is not None and two.shape[1] == 2
    one = attention_maps(loaded, Request("circle", image=request.image[0]), "yes").image
    assert one is not None and one.shape[1:] == (side, side)
    page = attention_html(loaded, request, "yes")
    assert all(f"p0 over picture {i}" in page for i in (1, 2, 3))
    assert page.count("--image-3: url(") == 1 and "--image-4" not in page


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    config: Any = default_config("tiny")
    sizes = dict(size=8, patch_size=4, num_layers=1, max_images=2)
    config.model.image.update(encoder="vit", **sizes)
    config.model.update(num_processes=2, num_decoder_layers=1)
    config.data.update(name="folder", path=str(folder), batch_size=32, vocab_size=300)
    config.data.update(stages=((0, {"image": 1.0}),), resize="stretch", colour=0.1)
    config.optimizer.update(name="adamw", learning_rate=3e-3, warmup_steps=5)
    config.run.update(num_steps=60, evaluate_every=60)
    train(config, workdir := tmp_path_factory.mktemp("runs") / "pairs")
    return workdir


@pytest.mark.slow
def test_a_run_learns_a_question_that_needs_both_pictures(run, folder):
    found = evaluate_checkpoint(run)
    assert found.metrics["views"]["image"]["all"]["accuracy"] >= 0.9
    page = render_report(found)
    assert 'alt="picture 2"' in page and "p0 over picture 2" in page
    loaded = load(run)
    paths = [[folder / "4.png", folder / "28.png"], [folder / "28.png", folder / "4.png"]]
    answers = generate(loaded, [Request("brighter?", image=each) for each in paths])
    assert [answer.text for answer in answers] == ["second", "first"]
    (said,), _ = ask(run, ["--prompt=brighter?", *(f"--image={path}" for path in paths[1])])
    assert said == [0, "first\n", ""]


@pytest.mark.slow
def test_requests_are_resized_as_the_run_was_trained(run, folder):
    loaded = load(run)
    assert loaded.resize == "stretch"
    inputs: Any = read_inputs(loaded, [Request("brighter?", image=folder / "28.png")])
    assert (inputs.image[0, 0] == 8 * 28).all()  # a letterbox would have grey at its sides
