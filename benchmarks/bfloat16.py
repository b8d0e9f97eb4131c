"""Products in bfloat16: `standard` against torch in bfloat16, `slam_v6` against itself in float32.

Forward passes have parameters in bfloat16 too; training keeps them in float32 on both sides, torch
by autocast.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks import ours, theirs
from benchmarks.comparison import Arm, Comparison
from benchmarks.sizes import NARROW, forward_flops, training_flops, weights
from slam_jax.language_models import make_config


def comparisons(quick: bool, folder: str) -> Iterator[Comparison]:
    preset, length = ("tiny", 16) if quick else ("seed", 128)
    config, saved = weights(folder, "standard", preset)
    for rows in (8, 1):
        given = {"folder": saved, "rows": rows, "length": length}
        yield Comparison(
            f"standard in bfloat16, forward {rows} x {length}",
            theirs.beside(
                ours.forward,
                theirs.forward,
                given,
                0.7,
                mine=NARROW,
                other={"dtype": "bfloat16"},
            ),
            tolerance=0.1,
            repeats=3 if rows > 1 else 10,
            flops=forward_flops(config, rows, length),
        )
    given = {"folder": saved, "rows": 8, "length": length}
    yield Comparison(
        f"standard in bfloat16, training step 8 x {length}",
        theirs.beside(
            ours.training_step,
            theirs.training_step,
            given,
            0.7,
            mine={"dtype": "bfloat16"},
            other={"autocast": True},
        ),
        tolerance=0.02,
        checked=3,
        flops=training_flops(config, 8, length),
    )
    given = {"preset": preset, "rows": 8, "length": length}
    yield Comparison(
        f"slam_v6, forward 8 x {length}",
        [
            Arm("bfloat16", v6_losses, {**given, "dtype": "bfloat16"}),
            Arm("float32", v6_losses, {**given, "dtype": "float32"}, aim=1.7),
        ],
        tolerance=0.05,
        flops=forward_flops(make_config("slam_v6", preset), 8, length),
    )


def v6_losses(preset: str, rows: int, length: int, dtype: str) -> Any:
    """The loss [rows] of each row; logits are computed with the parameters rounded to `dtype`."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from slam_jax.language_models import make_model
    from slam_jax.runtime.compile_cache import enable_compile_cache
    from slam_jax.training.losses import token_losses
    from slam_jax.training.state import merge_model, split_model

    enable_compile_cache()
    config = make_config("slam_v6", preset)
    params = split_model(jax.jit(lambda: make_model(config, rngs=nnx.Rngs(0)))())[1]
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    narrow = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make_model(narrow, rngs=nnx.Rngs(0))))
    given = jnp.asarray(ours.tokens(config.vocab_size, rows, length + 1))

    @jax.jit
    def run(params, given):
        logits = merge_model(graphdef, params)(given[:, :-1]).logits
        return jnp.mean(token_losses(logits, given[:, 1:]).cross_entropy, axis=-1)

    return lambda: run(params, given)
