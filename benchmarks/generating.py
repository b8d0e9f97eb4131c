"""`generate()`, one prompt of 32 tokens and 64 new ones, against transformers' own.

Systems without a peer there have their time alone.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import theirs
from benchmarks.comparison import Arm, Comparison
from benchmarks.sizes import decoding_bytes, weights
from slam_jax.language_models import ROCKET

PUBLISHED = ("standard", "moe", "jamba", "deepseek_v2")


class Numbers(NamedTuple):
    """A tokenizer whose texts are token ids, so that all models are asked the same."""

    vocab_size: int
    bos_id: int = 1
    pad_id: int = 0
    end_ids: tuple[int, ...] = ()  # no answer ends by itself
    known: None = None

    def encode_prompt(self, text: str) -> list[int]:
        return [self.bos_id, *(int(word) for word in text.split())]

    def check(self, text: str, name: str) -> None:
        pass

    def to_bytes(self, ids: list[int]) -> bytes:
        return b""


def ours(folder: str, prompt: list[int], new_tokens: int) -> Any:
    from slam_jax.interop import load_pretrained
    from slam_jax.runtime.compile_cache import enable_compile_cache

    enable_compile_cache()
    model, _ = load_pretrained(folder)
    return _generating(model, prompt, new_tokens)


def ours_alone(system: str, preset: str, prompt: list[int], new_tokens: int) -> Any:
    import jax
    from flax import nnx

    from slam_jax.language_models import make_config, make_model
    from slam_jax.runtime.compile_cache import enable_compile_cache

    enable_compile_cache()
    config = make_config(system, preset)
    model = jax.jit(lambda: make_model(config, rngs=nnx.Rngs(0)))()
    return _generating(model, prompt, new_tokens)


def _generating(model: Any, prompt: list[int], new_tokens: int) -> Any:
    from slam_jax.generation import ModelAndTokenizer, Request, Sampling, generate

    tokenizer: Any = Numbers(model.config.vocab_size)
    loaded = ModelAndTokenizer(model, tokenizer)
    request = Request(" ".join(map(str, prompt[1:])))  # <bos> comes by itself
    sampling = Sampling(temperature=0.0, max_new_tokens=new_tokens)
    return lambda: generate(loaded, [request], sampling)[0].samples[0].tokens


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    preset, length, new_tokens = ("tiny", 8, 8) if quick else ("seed", 32, 64)
    prompt = [1, *range(3, 2 + length)]
    given: dict[str, Any] = {"prompt": prompt, "new_tokens": new_tokens}
    for system in ROCKET:
        title = f"{system}, generate {new_tokens} tokens"
        if system not in PUBLISHED:
            arm = Arm("slam_jax", ours_alone, {"system": system, "preset": preset, **given})
            yield Comparison(title, [arm], tolerance=None, unchecked="no peer to check with")
            continue
        config, saved = weights(folder, system, preset)
        here = {"folder": saved, **given}
        yield Comparison(
            title,
            theirs.beside(ours, theirs.generation, here, 2.0),
            tolerance=0.0,
            bytes_moved=new_tokens * decoding_bytes(config, length + new_tokens // 2),
        )
