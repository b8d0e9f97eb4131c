"""The loss and its gradient at a large vocabulary, a chunk of tokens at a time, against all logits.

Memory is the peak of the first call minus the memory before it (Linux only). It includes both
gradients, and not the libraries, the arguments and the compiled executable.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.comparison import Arm, Comparison, Measured

DIM, CHUNK = 512, 256


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    tokens, vocab_size = (1_024, 4_096) if quick else (4_096, 131_072)
    sizes = {"tokens": tokens, "vocab_size": vocab_size}
    for what, unit, aim, repeated in (
        ("peak memory", "MiB", 4.0, {"repeats": 0}),
        ("time", "s", None, {"repeats": 3}),
    ):
        arguments = {**sizes, **repeated}
        yield Comparison(
            f"loss and gradient, {tokens:,} tokens, vocabulary {vocab_size:,}, {what}",
            [
                Arm("chunks", gradient, {**arguments, "chunk_tokens": CHUNK}),
                Arm("full logits", gradient, {**arguments, "chunk_tokens": None}, aim=aim),
            ],
            tolerance=1e-4,
            fresh=True,
            unit=unit,
        )


def gradient(tokens: int, vocab_size: int, chunk_tokens: int | None, repeats: int) -> Measured:
    """MiB, or with `repeats` the seconds of the fastest call. The output holds the loss and a
    mark of both gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from slam_jax.training.losses import token_losses, token_losses_in_chunks

    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((DIM, vocab_size), np.float32) / DIM**0.5)
    hidden = jnp.asarray(rng.standard_normal((tokens, DIM), np.float32))
    targets = jnp.asarray(rng.integers(0, vocab_size, tokens, np.int32))

    def loss(kernel: Any, hidden: Any) -> Any:
        def head(h):
            return h @ kernel

        if chunk_tokens is None:
            losses = token_losses(head(hidden), targets)
        else:
            losses = token_losses_in_chunks(head, hidden, targets, chunk_tokens)
        return jnp.mean(losses.cross_entropy)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(kernel, hidden).compile()
    before = _kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see man 5 proc
    value, gradients = jax.block_until_ready(compiled(kernel, hidden))
    figure = (_kib("VmHWM") - before) / 1024
    if repeats:
        figure = min(_seconds(compiled, kernel, hidden) for _ in range(repeats))
    return Measured(np.array([float(value), *map(_mark, gradients)]), figure)


def _mark(gradient: Any) -> float:
    """A weighted sum of the normalised gradient, about 1."""
    import jax.numpy as jnp

    shares = jnp.cos(jnp.arange(gradient.size)).reshape(gradient.shape)
    return float(jnp.sum(shares * gradient) / jnp.linalg.norm(gradient))


def _kib(field: str) -> int:
    """VmRSS (current) or VmHWM (peak) of this process in KiB, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _seconds(compiled: Any, *arguments: Any) -> float:
    import jax

    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - start
