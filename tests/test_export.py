"""Exported models: the same tokens without this library, in the forms for CPUs and accelerators."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_files import real_file
from test_hub_tokenizer import byte_level, sentence_piece

import slam_jax
from slam_jax.data import HubTokenizer, Tokenizer
from slam_jax.data.images import load_image
from slam_jax.errors import InputError
from slam_jax.generation import ModelAndTokenizer
from slam_jax.generation.decode import greedy_decode
from slam_jax.generation.requests import allowed_tokens
from slam_jax.interop.export import export_model, folder, programs, run
from slam_jax.kernels import fused_attention, grouped_matmul
from slam_jax.kernels.backend import for_export, on_cpu
from slam_jax.kernels.fused_attention import kernel_of
from slam_jax.language_models import SYSTEMS, make_config, make_model
from slam_jax.runtime.files import sha256
from slam_jax.slam_v3 import ImageConfig, Inputs, SlamV3, SlamV3Config
from slam_jax.slam_v3.config import DecoderConfig
from slam_jax.training import Loaded, merge_model, split_model

# A model may have more rows than its tokenizer has tokens.
TOKENIZER = HubTokenizer(sentence_piece().to_str(), end_ids=(2, 40), bos_id=1)
VOCAB = TOKENIZER.vocab_size + 99
PROMPTS = [[1, 57, 80, 9, 33], [1, 5]]
NEW = 5
# Refuses what is not in a new environment; flatbuffers is that of the folder.
ALONE = """
import sys
from importlib.machinery import PathFinder
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("slam_jax", "flax", "tokenizers", "jaxtyping"):
            raise ImportError(name)
        if name == "flatbuffers":
            found = PathFinder.find_spec(name, [x for x in sys.path if x.endswith("/packages")])
            if found is None:
                raise ImportError(name)
            return found
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import json, run
model = run.Model()
prompts, inputs, new = json.loads(sys.argv[2])
for each in inputs:
    if each.get("image"):
        each["image"] = run.np.array(each["image"], "uint8")
print(json.dumps(model.generate(prompts, inputs, new)))
"""


def random_model(make: Any) -> Any:
    """A model without its initialisers, which take longer to compile than all that follows."""
    graphdef, shapes = split_model(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(x: Any) -> jax.Array:
        return jnp.asarray(rng.normal(scale=0.4, size=x.shape), x.dtype)

    return merge_model(graphdef, jax.tree.map(draw, shapes))


def language_model(name: str, **changes: Any) -> ModelAndTokenizer:
    config = make_config(name, "tiny", vocab_size=VOCAB, **changes)
    model = random_model(functools.partial(make_model, config))
    return ModelAndTokenizer(model, TOKENIZER, max_new_tokens=NEW)


def slam_v3(**changes: Any) -> Loaded:
    fields: Any = {"image": ImageConfig(size=12, stage_widths=(8,)), "max_aux": 3, **changes}
    config = SlamV3Config.preset("tiny", VOCAB, **fields)
    return Loaded(random_model(functools.partial(SlamV3, config)), TOKENIZER, None, {}, 1, NEW)


def examples() -> list[dict[str, Any]]:
    """Two examples, with other parts in each."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (12, 12, 3), np.uint8)
    vectors = rng.normal(size=(2, 5)).astype(np.float32)
    return [{"image": picture, "text": [7, 8, 9]}, {"aux": vectors, "image": None}]


def as_inputs(given: list[dict[str, Any]]) -> Inputs:
    """The same for the model itself, whose absent parts are masked."""
    [first, second] = given
    none, some = np.zeros(2, bool), np.array([True, False])
    blank = np.zeros_like(first["image"])
    return Inputs(
        text=np.array([first["text"], [0, 0, 0]], np.int32),
        text_mask=np.array([[True] * 3, [False] * 3]),
        image=np.stack([first["image"], blank]),
        image_mask=some | none,
        aux=np.stack([np.zeros_like(second["aux"]), second["aux"]]),
        aux_mask=np.array([[False] * 2, [True] * 2]),
    )


def expected(loaded: Any, given: Any = None) -> list[list[int]]:
    """The answers of this library, each up to its end."""
    tokens = np.zeros((len(PROMPTS), 8), np.int32)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    encode = jax.jit(lambda model, inputs: model.encode(inputs))
    memory = None if given is None else encode(loaded.model, as_inputs(given))
    found = greedy_decode(
        *(loaded.model, memory, tokens, np.array(list(map(len, PROMPTS)))),
        max_new_tokens=NEW,
        eos_id=loaded.tokenizer.end_ids,
        pad_id=loaded.tokenizer.pad_id,
        allowed=allowed_tokens(loaded),
    )
    answers = []
    for row in np.asarray(found.tokens).tolist():
        ends = [i + 1 for i, token in enumerate(row) if token in loaded.tokenizer.end_ids]
        answers.append(row[: min(ends, default=NEW)])
    return answers


SIZES: dict[str, Any] = dict(
    platforms=("cpu",), batch=2, max_length=16, prompt_lengths=(8,), text_length=4
)


def check_both_forms(loaded: Any, out: Path, given: Any = None) -> None:
    """The folder, and the programs for accelerators, which a CPU runs as well."""
    answers = expected(loaded, given)
    export_model(loaded, out, **SIZES)
    model: Any = run.Model(out)
    assert model.generate(PROMPTS, given) == answers
    sizes = folder._sizes(loaded, 2, 16, (8,), ("text", "image", "aux"), 4)
    functions = programs.exportable(loaded, sizes).functions
    for name, (function, arguments) in functions.items():
        # Any platform: nothing in it is of one device.
        programs.lower(function, arguments, ("cuda", "tpu"), cpu=False)
        data = programs.lower(function, arguments, ("cpu",), cpu=False)
        program = jax.export.deserialize(bytearray(data))
        model._programs[name] = jax.jit(program.call)
    assert model.generate(PROMPTS, given) == answers


@pytest.mark.slow
def test_a_mixture_of_experts_is_the_same_in_both_forms(tmp_path):
    """The form for accelerators has ragged products, that of CPUs has rows of experts.

    The model leaves its dtype to the device, and has that of this one, with its precision.
    """
    loaded = language_model("moe", num_layers=1, dtype=None, matmul_precision="tensorfloat32")
    check_both_forms(loaded, tmp_path / "out")
    sizes = folder._sizes(loaded, 2, 16, (8,), (), 4)
    step = programs.exportable(loaded, sizes).functions["decode_step"]
    texts = [
        jax.export.deserialize(bytearray(programs.lower(*step, ("cpu",), cpu=cpu))).mlir_module()
        for cpu in (True, False)
    ]
    assert ["ragged_dot" in text for text in texts] == [False, True]
    assert ["[HIGH, HIGH]" in text for text in texts] == [False, True]
    assert not any(str(folder.LOADER.parents[3]) in text for text in texts)  # no paths of ours


def test_an_export_on_a_gpu_has_no_kernels_of_libraries(monkeypatch):
    q = jnp.zeros((1, 256, 2, 8))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for module in (fused_attention, grouped_matmul):
        monkeypatch.setattr(module, "has_tokamax", lambda: True)
        monkeypatch.setattr(module, "cuda_capability", lambda: 9.0)
    products = jnp.ones((3, 4)), jnp.ones((2, 4, 5)), jnp.array([1, 2])
    assert kernel_of(q, 256, 8, None) == "tokamax" and not on_cpu()
    for cpu in (True, False):
        with for_export(cpu=cpu):
            assert kernel_of(q, 256, 8, None) is None and on_cpu() == cpu
            # tokamax is not installed here: it would fail.
            assert grouped_matmul.ragged_dot(*products).shape == (3, 5)


@pytest.mark.release
def test_slam_v3_runs_with_jax_and_numpy_alone(tmp_path):
    loaded, out = slam_v3(), tmp_path / "out"
    given = examples()
    manifest = export_model(loaded, out, **SIZES)
    assert manifest["inputs"][0] == {"name": "text", "shape": [2, 4], "dtype": "int32"}
    assert {each.name for each in out.iterdir()} == {
        *("manifest.json", "packages", "programs", "run.py", "tokenizer", "weights-0.npz")
    }
    as_lists = [
        {k: v if v is None else np.asarray(v).tolist() for k, v in x.items()} for x in given
    ]
    command = [sys.executable, "-I", "-c", ALONE, str(out), json.dumps([PROMPTS, as_lists, NEW])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout or "null") == expected(loaded, given), done.stderr
    model: Any = run.Model(out)
    for wrong, message in [
        (([[]], None), "1 to 2 prompts of 1 to 8 tokens"),
        (([[1]] * 3, None), "1 to 2 prompts"),
        (([list(range(9))], None), "1 to 8 tokens"),
        (([[1]], None), "give inputs: .'text', 'image', 'aux'"),
        (([[1]], {"image": None}), "give inputs"),
        (([[1]], {"image": given[0]["image"] / 255}), "image is float64.12, 12, 3.; give uint8"),
        (([[1]], {"image": given[0]["image"][:6]}), "give uint8.12, 12, 3"),
        (([[1]], {"text": [1, 2, 3, 4, 5]}), "give int32.4."),
        (([[1]], {"aux": np.zeros((2, 4))}), "give float32.3, 5."),
    ]:
        with pytest.raises(ValueError, match=message):
            model.generate(*wrong)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    export_model(language_model("standard", num_layers=1), out, **SIZES)
    return out


def copy_with(out: Path, to: Path, changes: dict[str, Any]) -> Any:
    """The loader of a folder with other fields in its manifest."""
    subprocess.run(["cp", "-r", str(out), str(to)], check=True)
    manifest = json.loads((to / "manifest.json").read_text())
    for name, value in changes.items():
        old = manifest[name]
        manifest[name] = {**old, **value} if isinstance(old, dict) else value
    (to / "manifest.json").write_text(json.dumps(manifest))
    return lambda: run.Model(to)


def test_what_does_not_fit_is_refused(exported, tmp_path):
    newer = copy_with(exported, tmp_path / "newer", {"made_with": {"jax": "99.1.0"}})
    older = copy_with(exported, tmp_path / "older", {"made_with": {"calling_convention": 1}})
    other = copy_with(exported, tmp_path / "other", {"platforms": {}})
    (tmp_path / "other" / "manifest.json").write_text(
        (tmp_path / "other" / "manifest.json").read_text().replace('{"cpu": "cpu"}', '{"tpu": "x"}')
    )
    for load, message in [
        (newer, "made with jax 99.1.0, which jax .* cannot run"),
        (older, "cannot run"),
        (other, "made for tpu; this is cpu"),
    ]:
        with pytest.raises(ValueError, match=message):
            load()
    for token in (-1, 10**6, 10**20):
        with pytest.raises(ValueError, match="token ids are from 0 to"):
            run.Model(exported).generate([[1, token]])


def test_a_changed_file_is_refused_and_nothing_is_unpickled(exported, tmp_path):
    load = copy_with(exported, tmp_path / "out", {})
    weights = tmp_path / "out" / "weights-0.npz"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="weights-0.npz is not the file that was exported"):
        load()
    names = [
        each["name"] for each in json.loads((exported / "manifest.json").read_text())["weights"]
    ]
    pickled: dict[str, Any] = {name: np.array([print], object) for name in names}
    np.savez(weights, **pickled)
    load = copy_with(
        tmp_path / "out", tmp_path / "two", {"files": {"weights-0.npz": sha256(weights)}}
    )
    with pytest.raises(ValueError, match="allow_pickle"):
        load()
    program = exported / "programs" / "cpu" / "decode_step.bin"
    (tmp_path / "two" / "programs" / "cpu" / "decode_step.bin").write_bytes(
        program.read_bytes()[1:]
    )
    model: Any = run.Model(exported)
    model.folder = tmp_path / "two"
    with pytest.raises(ValueError, match="decode_step.bin is not the file"):
        model.decode_step(np.zeros(2), ())


def test_weights_of_bfloat16_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_PART_BYTES", 100)
    weights = {
        "a": jnp.arange(40, dtype=jnp.bfloat16) / 7,
        "b": np.full((1, 1), 1.5, np.float32),
        "c": jnp.arange(49, dtype=jnp.bfloat16) / 3,
        "d": np.array([True, False]),
    }
    about = folder._write_weights(tmp_path, weights)
    assert [each["file"] for each in about] == [f"weights-{i}.npz" for i in (0, 0, 1, 1)]
    for (name, value), each in zip(weights.items(), about, strict=True):
        stored = np.load(tmp_path / each["file"], allow_pickle=False)[name]
        assert stored.dtype.kind in "bfu"  # NumPy would read bfloat16 as bytes of no dtype
        np.testing.assert_array_equal(stored.view(jnp.dtype(each["dtype"])), value)


OWN = Tokenizer.train(["the cat sat on the mat"] * 3, 280)
CUT = byte_level(bos=False)
CUT.enable_truncation(2)
CUT.enable_padding(length=16)
TOKENIZERS = {
    "own": OWN,
    "adds its own": HubTokenizer(byte_level(bos=True).to_str(), (1,), 0),
    "adds nothing": HubTokenizer(byte_level(bos=False).to_str(), (1,), 0),
    "adds a BOS": HubTokenizer(byte_level(bos=False).to_str(), (1,), 0, adds_bos=True),
    "strips": TOKENIZER,
    "has a stored length": HubTokenizer(CUT.to_str(), (1,), 0),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_become_the_same_ids(name, tmp_path):
    tokenizer = TOKENIZERS[name]
    model: Any = object.__new__(run.Model)
    loaded = ModelAndTokenizer(language_model("standard", num_layers=1).model, TOKENIZER)
    object.__setattr__(loaded, "tokenizer", tokenizer)
    about = folder._about(loaded, programs.Sizes(1, 8, (8,), {}), tokenizer is not OWN)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(tokenizer.json)
    digest = sha256(tmp_path / "tokenizer" / "tokenizer.json")
    model.folder, model.about = tmp_path, {**about, "files": {"tokenizer/tokenizer.json": digest}}
    for text in ("the cat", "", "<eos> café", "<|user|> 日本", " two  spaces"):
        assert model.to_ids(text) == tokenizer.encode_prompt(text)
        ids = tokenizer.encode(text)
        assert model.to_text([*ids, tokenizer.eos_id]) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"platforms": ("cpu", "gpu")}, "platforms: 'cpu, gpu'; expected some of cpu, cuda"),
        ({"batch": 0}, "batch is 0; expected a whole number from 1"),
        ({"max_length": 65}, "max_length is 65; expected a whole number from 1 to 64"),
        ({"prompt_lengths": (17,)}, "prompt_lengths is 17; expected a whole number from 1 to 16"),
        ({"prompt_lengths": ()}, "give at least one"),
        ({"inputs": ("sound",)}, "inputs: .'sound',.; expected some of text, image, aux"),
    ],
)
def test_settings_are_checked(changes, message, tmp_path):
    loaded = slam_v3(context_length=64)
    with pytest.raises(InputError, match=message):
        export_model(loaded, tmp_path / "out", **{**SIZES, **changes})


def test_a_folder_is_whole_or_absent(tmp_path, monkeypatch):
    loaded = language_model("standard", num_layers=1)
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="it exists already"):
        export_model(loaded, tmp_path / "there", **SIZES)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "_write_weights", stop)
    with pytest.raises(KeyboardInterrupt):
        export_model(loaded, tmp_path / "out", **SIZES)
    assert [each.name for each in tmp_path.iterdir()] == ["there"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_language_model_gives_the_same_tokens(name, tmp_path):
    check_both_forms(language_model(name, dtype=None), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_weights_give_the_same_tokens(dtype, tmp_path):
    loaded = language_model("standard", param_dtype="bfloat16", dtype=dtype)
    check_both_forms(loaded, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("system", [None, "standard", "deepseek_v2", "jamba"])
def test_slam_v3_of_every_decoder_gives_the_same_tokens(system, tmp_path):
    changes: dict[str, Any] = {}
    if system is not None:
        config = make_config(system, "tiny", vocab_size=VOCAB)
        changes["decoder"] = DecoderConfig("folder", 2, system, config)
    check_both_forms(slam_v3(dtype=None, **changes), tmp_path / "out", examples())


@pytest.fixture(scope="module")
def published() -> Path:
    return real_file()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory) -> str:
    """Python with jax and numpy alone."""
    place = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = str(place / "bin" / "python")
    needs = [f"jax=={jax.__version__}", "numpy"]
    subprocess.run([python, "-m", "pip", "install", "-q", *needs], check=True)
    return python


def command(*args: str) -> str:
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_shipped_model_answers_in_a_new_environment(fresh, tmp_path):
    out, picture = tmp_path / "out", tmp_path / "scene.npy"
    module = [sys.executable, "-m", "slam_jax.interop.export", "--model=quickstart", str(out)]
    assert "for cpu, cuda, tpu" in command(*module, "--platforms=cpu,cuda,tpu")
    loaded = slam_jax.load("quickstart")
    scene = Path(__file__).parents[1] / "docs" / "scene.png"
    np.save(picture, load_image(scene, 75))
    for prompt in ("shape of red", "left half: blue"):
        request = slam_jax.Request(prompt, image=np.load(picture))
        [answer] = slam_jax.generate(loaded, [request], slam_jax.Sampling(max_new_tokens=6))
        ids = ",".join(map(str, loaded.tokenizer.encode_prompt(prompt)))
        args = [f"--ids={ids}", f"--image={picture}", "--max_new_tokens=6"]
        found = command(fresh, "-I", str(out / "run.py"), *args)
        assert found.strip() == ",".join(map(str, answer.samples[0].tokens))


@pytest.mark.slow
def test_a_published_model_answers_in_a_new_environment(published, fresh, tmp_path):
    loaded, out = slam_jax.load(published), tmp_path / "out"
    export_model(loaded, out, platforms=("cpu",), max_length=128, prompt_lengths=(64,))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    request, most = slam_jax.Request(messages=messages), slam_jax.Sampling(max_new_tokens=24)
    [answer] = slam_jax.generate(loaded, [request], most)
    ids = ",".join(map(str, loaded.tokenizer.encode_chat(messages)))
    found = command(fresh, "-I", str(out / "run.py"), f"--ids={ids}", "--max_new_tokens=24")
    assert found.strip() == ",".join(map(str, answer.samples[0].tokens))
