"""SLAM v3 on published parts: a language model as the decoder, a vision tower as image stream."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import write_language_model
from flax import nnx
from PIL import Image
from test_hub_tokenizer import QUESTION, TEMPLATE

import slam_jax
from slam_jax.errors import ConfigError, InputError
from slam_jax.generation import Request, Sampling, generate
from slam_jax.interop import load_preprocessing, load_pretrained, load_vision
from slam_jax.language_models import make_config
from slam_jax.planning.subjects import subject_of
from slam_jax.slam_v3 import Inputs, SlamV3, SlamV3Config
from slam_jax.slam_v3.config import DecoderConfig, ImageConfig
from slam_jax.training import Checkpoints, default_config, load, train
from slam_jax.training.checkpoint.trees import by_name, num_bytes
from slam_jax.training.pretrained import with_pretrained
from slam_jax.training.state import split_model
from slam_jax.vision_models import preprocess

pytestmark = pytest.mark.release

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "goldens"
SIGLIP = GOLDENS / "vision" / "siglip_vision"


def model_on(name: str, **changes) -> SlamV3:
    """A tiny model on a golden, with open gates."""
    decoder = DecoderConfig(pretrained=str(GOLDENS / name), memory_every=2)
    config = with_pretrained(SlamV3Config.preset("tiny", 1, decoder=decoder, **changes))
    model = SlamV3(config, rngs=nnx.Rngs(0))
    model.decoder.language_model = load_pretrained(GOLDENS / name, scan_layers=False)[0]
    return model


def open_gates(model: SlamV3) -> None:
    for reader in model.decoder.readers:
        reader.gate[...] = jnp.full_like(reader.gate[...], 0.5)


@jax.jit
def answered(model, tokens, inputs):
    return model(tokens, inputs).logits


@jax.jit
def chunked(model, tokens, inputs):
    """The logits of a prefill, an appended chunk and decoding steps, one after the other."""
    memory = model.encode(inputs)
    cache = model.init_cache(tokens.shape[:-1], tokens.shape[-1])
    first, cache = model.prefill(tokens[..., :3], cache, memory)
    second, cache = model.prefill(tokens[..., 3:5], cache, memory, append=True)
    found = [first, second]
    for i in range(5, tokens.shape[-1]):
        logits, cache = model.decode_step(tokens[..., i], cache, memory)
        found.append(logits[..., None, :])
    return jnp.concatenate(found, axis=-2)


@pytest.mark.parametrize(
    "name",
    [
        *("deepseek_v2", "llama"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "jamba", "mixtral")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v3", "hunyuan_large")),
    ],
)
def test_a_new_model_writes_what_its_language_model_writes(name):
    model = model_on(name)
    vocab = model.config.vocab_size
    tokens = jax.random.randint(jax.random.key(1), (2, 3, 7), 0, vocab)
    image = jax.random.randint(jax.random.key(2), (2, 24, 24, 3), 0, 255).astype(jnp.uint8)
    inputs = Inputs(image=image, text=tokens[:, 0], text_mask=tokens[:, 0] > vocab // 4)
    new = answered(model, tokens, inputs)
    np.testing.assert_allclose(new, model.decoder.language_model(tokens).logits, atol=1e-5)
    open_gates(model)
    full = answered(model, tokens, inputs)
    assert jnp.abs(full - new).max() > 1e-3  # the memory is read
    # The decoding steps read memory and text in the absorbed form.
    np.testing.assert_allclose(chunked(model, tokens, inputs), full, atol=2e-5, rtol=1e-4)


def test_the_cache_is_the_latents_of_the_language_model():
    model = model_on("deepseek_v2")
    cache, config = model.init_cache((2, 3), 7), model.config.language_model
    assert cache.blocks[0].c_kv.shape == (2, 3, 7, config.kv_lora_rank)
    assert cache.blocks[0].k_rope.shape == (2, 3, 7, config.qk_rope_head_dim)
    memory = model.encode(Inputs(aux=jnp.ones((2, 3, model.config.aux_dim))))
    assert memory.c_mem.shape == (2, 3, model.config.kv_lora_rank)
    with pytest.raises(InputError, match="prefill into a cache that stores 2 tokens"):
        tokens = jnp.ones((2, 3, 2), jnp.int32)
        model.prefill(tokens, model.prefill(tokens, cache, memory)[1], memory)


def test_the_image_stream_is_what_the_publisher_computes():
    config = SlamV3Config.preset("tiny", 20, image=ImageConfig(pretrained=str(SIGLIP)))
    config = with_pretrained(config)
    tower = load_vision(SIGLIP)[0]
    how: Any = load_preprocessing(SIGLIP)
    assert config.image.size == how.size[0] and config.tower.patch_size == tower.config.patch_size
    model = SlamV3(config, rngs=nnx.Rngs(0))
    model.streams.image.tower = tower
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    squashed = Image.fromarray(picture).resize(how.size, how.resample)
    found = model.streams.image(jnp.asarray(squashed, jnp.float32)[None] / 127.5 - 1)
    expected = model.streams.image.project(tower.patches(preprocess(picture, how)[None]))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    rows, columns = config.image.grid(*how.size)
    assert found.shape[1] == rows * columns
    # Another layer, and another size.
    other = dataclasses.replace(config.image, layer=-2, tower=None, pretrained_size=40)
    other = with_pretrained(dataclasses.replace(config, image=other)).image
    assert (other.size, other.preprocessing.size) == (40, (40, 40))
    with pytest.raises(ConfigError, match=r"image.layer is 9; expected None, or -\d to \d"):
        dataclasses.replace(other, layer=9)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A folder of the hub with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("parts") / "lm"
    write_language_model(folder, 4)
    return folder


def digits_config(language_model: Path, **optimizer: Any) -> Any:
    config: Any = default_config("tiny")
    config.model.decoder.pretrained = str(language_model)
    config.model.image.pretrained = str(SIGLIP)
    config.data.name = "digits/words"
    config.data.batch_size = 4
    config.data.stages = ((0, {"image": 1.0}),)
    config.run.num_steps, config.run.evaluate_every, config.run.evaluate_batches = 4, 2, 1
    config.optimizer.update(optimizer)
    return config


@pytest.fixture(scope="module")
def run(language_model, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("parts") / "run"
    state = train(digits_config(language_model, ema_decay=0.9), workdir)
    return workdir, state


def test_published_weights_stay_bit_for_bit(run, language_model):
    _, state = run
    parts = state.frozen["decoder"]["language_model"], state.frozen["streams"]["image"]["tower"]
    published = load_pretrained(language_model, scan_layers=False)[0], load_vision(SIGLIP)[0]
    for part, model in zip(parts, published, strict=True):
        found, expected = by_name(part), by_name(split_model(model)[1])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, strict=True, err_msg=name)
    gates = [r["gate"] for r in state.params["decoder"]["readers"].values()]
    assert all(float(gate) != 0 for gate in gates)


def test_a_checkpoint_has_what_trains_alone(run):
    workdir, state = run
    own = num_bytes((state.params, state.opt_state, state.ema))
    files = [path for path in (workdir / "checkpoints" / "4").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.2 * own + 300_000  # tokenizer, metadata


@pytest.mark.slow
def test_a_checkpoint_is_opened_where_its_parts_have_moved(run, language_model, tmp_path):
    workdir, _ = run
    request = [Request("Which digit is it?", image=np.zeros((8, 8, 3), np.uint8))]
    loaded = load(workdir)
    expected = generate(loaded, request, Sampling(max_new_tokens=4))
    assert loaded.tokenizer.chat_template == TEMPLATE
    assert loaded.model.config.language_model.vocab_size == loaded.tokenizer.vocab_size + 4
    copy = tmp_path / "elsewhere"
    moved = language_model.with_name("moved")
    shutil.copytree(language_model, copy)
    language_model.rename(moved)
    try:
        with pytest.raises(InputError, match="--base=FOLDER"):
            load(workdir)
        found = generate(load(workdir, base=[copy]), request, Sampling(max_new_tokens=4))
        assert found == expected
        data = bytearray((copy / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (copy / "model.safetensors").write_bytes(data)
        with pytest.raises(InputError, match="model.safetensors: its sha256 is"):
            load(workdir, base=[copy])
        state = train(digits_config(language_model, ema_decay=0.9), workdir, base=[moved])
        assert int(state.step) == 4
    finally:
        moved.rename(language_model)


def test_a_shared_folder_needs_no_other_files(run, language_model, tmp_path):
    """Weights are split into several files, and one has the tokenizer of the language model."""
    loaded = load(run[0])
    slam_jax.save_pretrained(loaded, tmp_path / "shared", max_shard_bytes=100_000)
    names = {path.name for path in (tmp_path / "shared").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "README.md"} < names
    assert "model.safetensors.index.json" in names
    moved = language_model.rename(language_model.with_name("moved"))
    try:
        shared = load(tmp_path / "shared")
    finally:
        moved.rename(language_model)
    assert shared.tokenizer == loaded.tokenizer and shared[4:] == loaded[4:]
    assert shared.model.config.tower == loaded.model.config.tower
    about = (tmp_path / "shared" / "config.json").read_text()
    assert str(SIGLIP) not in about and str(language_model) not in about
    ours, theirs = (by_name(split_model(x.model)[1]) for x in (shared, loaded))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, strict=True, err_msg=name)


def test_a_published_model_is_loaded_asked_and_written_again(language_model, tmp_path):
    language_model = shutil.copytree(language_model, tmp_path / "copy")
    (language_model / "generation_config.json").write_text('{"eos_token_id": [1, 3], "top_k": 9}')
    loaded = load(language_model)
    assert (loaded.tokenizer.end_ids, loaded.max_new_tokens) == ((1, 3), 32)
    [answer] = generate(loaded, [Request(messages=QUESTION)])
    slam_jax.save_pretrained(loaded, tmp_path / "again")
    again = load(tmp_path / "again")
    assert generate(again, [Request(messages=QUESTION)]) == [answer]
    assert again.tokenizer.chat_template == TEMPLATE and again.tokenizer.generation["top_k"] == 9
    command = [sys.executable, "-m", "slam_jax.generation", f"--model={tmp_path / 'again'}"]
    settings: dict[str, Any] = dict(capture_output=True, text=True, timeout=300)
    done = subprocess.run([*command, "--prompt=the cat"], **settings)
    assert (done.returncode, done.stdout) == (0, f"{answer.text}\n"), done.stderr
    command = [sys.executable, ROOT / "eval.py", f"--workdir={language_model}"]
    done = subprocess.run(command, **settings)
    assert done.returncode == 2 and "data.path is not given" in done.stderr
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the cat sat on the mat")
    more = [f"--config.data.path={tmp_path / 'texts'}", f"--out={tmp_path / 'scores'}"]
    done = subprocess.run([*command, *more], **settings)
    assert done.returncode == 0 and "bits per byte" in done.stdout, done.stderr
    found = json.loads((tmp_path / "scores" / "metrics.json").read_text())["scores"]
    ids = jnp.array([*loaded.tokenizer.encode_prompt("the cat sat on the mat"), 1])
    logs = jax.nn.log_softmax(loaded.model(ids).logits)
    nats = -jnp.take_along_axis(logs[:-1], ids[1:, None], axis=-1).sum()
    assert found["loss"]["mean"] == pytest.approx(float(nats) / (len(ids) - 1), rel=1e-4)


def test_a_resumed_run_ends_as_an_unbroken_one(run, language_model, tmp_path):
    workdir, state = run
    config = digits_config(language_model, ema_decay=0.9)
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    resumed = train(config, tmp_path / "run")
    for name, value in by_name((resumed.params, resumed.opt_state, resumed.ema)).items():
        np.testing.assert_array_equal(
            value, by_name((state.params, state.opt_state, state.ema))[name], err_msg=name
        )
    stored = Checkpoints(workdir).read_config(4)["model"]
    assert stored["decoder"]["system"] == "standard"
    assert stored["image"]["tower"]["model_type"] == "siglip_vision_model"


@pytest.mark.slow
def test_a_language_model_may_train_as_well(language_model, tmp_path):
    config = digits_config(language_model, train=("decoder/*",))
    state = train(config, tmp_path)
    assert "streams" in state.frozen and "decoder" not in state.frozen
    trained = by_name(state.params["decoder"]["language_model"])
    published = by_name(split_model(load_pretrained(language_model, scan_layers=False)[0])[1])
    assert any((np.asarray(trained[name]) != published[name]).any() for name in published)
    assert load(tmp_path).step == 4


@pytest.mark.slow
def test_a_plan_counts_published_parts_as_frozen(language_model):
    subject = subject_of(digits_config(language_model))
    _, state = subject.state
    parts = load_pretrained(language_model)[0], load_vision(SIGLIP)[0]
    expected = sum(num_bytes(split_model(part)[1]) for part in parts)
    assert num_bytes(state.frozen) == expected
    assert "language_model" not in state.params["decoder"]
    frozen = digits_config(language_model, train=("*",))
    assert subject_of(frozen).state[1].frozen is None


@pytest.mark.parametrize(
    ("system", "message"),
    [("hunyuan_v1_moe", None), ("nothing", "decoder.system is 'nothing'; expected one of")],
)
def test_a_stored_decoder_is_read_from_json(system, message):
    config = make_config("hunyuan_v1_moe", "tiny")
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    if message is None:
        assert DecoderConfig(system=system, language_model=fields).language_model == config
    else:
        with pytest.raises(ConfigError, match=message):
            DecoderConfig(system=system, language_model=fields)
