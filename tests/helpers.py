"""What several test files need: programs compiled as one, bits compared, a full disk, a schema."""

import contextlib
import functools
import json
import resource
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
from flax import nnx

from slam_jax.rocket.machine import peak_memory
from slam_jax.rocket.seed.measure import SeedSettings

# The least that the seed protocol can measure.
TINY_SEED = SeedSettings(
    preset="tiny",
    batch_size=2,
    length=8,
    num_updates=2,
    rounds=1,
    repeats=1,
    stress_batch=1,
    stress_length=16,
)


def make(of: Callable[..., Any], *args: Any, **fields: Any) -> Any:
    """A layer, initialised under jit: that compiles one program, and not one for each operation."""
    return jax.jit(lambda: of(*args, **fields, rngs=nnx.Rngs(0)))()


def compiled(function: Callable[..., Any], *arrays: Any, **fixed: Any) -> Any:
    """What a function or a layer gives for arrays, compiled as one program."""
    return jax.jit(functools.partial(function, **fixed))(*arrays)


def assert_same(actual: Any, expected: Any) -> None:
    """Two trees have the same structure, dtypes and bits, typed keys included."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@contextlib.contextmanager
def full_disk(size: int = 1 << 14) -> Iterator[None]:
    """No file may grow over `size` bytes; where others write, they notice it in the background."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def reset_peak_memory() -> int:
    """Forgets the peak of this process, which others may have set; the bytes that it has now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def schema_errors(board: Any) -> list[str]:
    """What of a leaderboard does not follow the schema that is shipped with the package."""
    schema = json.loads(
        (resources.files("slam_jax.rocket") / "leaderboard.schema.json").read_text()
    )
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(board)]


def document(i: int) -> str:
    """A short text: words for digits, a different stretch each."""
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return " ".join(names[(i * 7 + j) % 10] for j in range(40 + i % 9)) + f" number {i}\n"


def write_texts(folder: Path, count: int = 120) -> Path:
    """A folder of text files, as the protocol `heldout` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.txt").write_text(document(i))
    return folder
