"""Mamba's scan and its gradient on this machine, against the same recurrence left to autodiff.

    python benchmarks/selective_scan.py

Arms alternate; the last line is the ratio of the medians.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from slam_jax.layers.mamba import selective_scan

ROUNDS, ROWS, TOKENS, WIDTH, STATE = 9, 16, 128, 384, 16


def plain(x, dt, a, b, c, state):
    """Chunks of 32, rematerialised; states [rows, width, N]."""

    def step(state, token):
        x, dt, b, c = token
        decay = jnp.exp(dt[..., None] * a)
        state = decay * state + (dt * x)[..., None] * b[..., None, :]
        return state, jnp.sum(state * c[..., None, :], axis=-1)

    def chunk(state, tokens):
        return jax.lax.scan(step, state, tokens)

    chunks = [jnp.moveaxis(z, 1, 0).reshape(-1, 32, ROWS, z.shape[-1]) for z in (x, dt, b, c)]
    state, y = jax.lax.scan(jax.checkpoint(chunk), state, chunks)
    return jnp.moveaxis(y.reshape(TOKENS, ROWS, WIDTH), 0, 1), state


def ours(*given):
    return selective_scan(*given, chunk_size=32)


def main() -> None:
    def normal(seed, *shape):
        return jax.random.normal(jax.random.key(seed), shape)

    given = (
        normal(0, ROWS, TOKENS, WIDTH),
        jax.nn.softplus(normal(1, ROWS, TOKENS, WIDTH) - 3),
        -jnp.tile(jnp.arange(1.0, STATE + 1), (WIDTH, 1)),
        normal(2, ROWS, TOKENS, STATE),
        normal(3, ROWS, TOKENS, STATE),
        jnp.zeros((ROWS, WIDTH, STATE)),
    )
    programs = {
        arm.__name__: jax.jit(jax.grad(lambda *z, arm=arm: (arm(*z)[0] ** 2).sum(), range(5)))
        for arm in (plain, ours)
    }
    seconds = {name: [] for name in programs}
    for i in range(ROUNDS + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*given))
            seconds[name] += [time.perf_counter() - start] if i else []  # the first compiles
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    for name, each in seconds.items():
        print(f"{name}: {1e3 * middle[name]:.0f} ms ({1e3 * min(each):.0f} at least)")
    print(f"ours / plain: {middle['ours'] / middle['plain']:.2f}")


if __name__ == "__main__":
    main()
