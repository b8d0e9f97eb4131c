"""The shapes of one forward pass of a model that exists as shapes alone."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from slam_jax.slam_v3 import Inputs, SlamV3
from slam_jax.slam_v3.streams import Stream


class Shapes(NamedTuple):
    """The shapes of one call with all inputs, abstract arrays. x: the tokens of all streams."""

    inputs: Inputs
    streams: list[Stream]
    x: Any
    k: Any
    y: Any
    memory: Any
    cache: Any
    tokens: Any
    logits: Any
    embedding: Any


def find_shapes(model: SlamV3, text: int, aux: int, prompt: int, max_length: int) -> Shapes:
    config = model.config
    new: Any = jax.ShapeDtypeStruct
    side = config.image.size if config.tower is None else config.tower.image_size
    inputs: Any = Inputs(
        text=new((1, text), jnp.int32),
        image=new((1, side, side, 3), jnp.uint8),
        aux=new((1, aux, config.aux_dim), jnp.float32),
    )
    tokens = new((1, 1, prompt), jnp.int32)

    def call(model: SlamV3, inputs: Inputs, tokens: jax.Array) -> Any:
        streams, bank = model.level_one(model._streams(inputs, None))
        y, _ = model.processes(streams, bank)
        memory = model.fuse(y, streams)
        logits, cache = model.prefill(tokens, model.init_cache((1, 1), max_length), memory)
        x = jnp.concatenate([stream.tokens for stream in streams], axis=1)
        return (
            [s.tokens for s in streams],
            x,
            bank,
            y,
            memory,
            cache,
            logits,
            model.alignment(memory),
        )

    parts, x, bank, y, memory, cache, logits, embedding = jax.eval_shape(
        call, model, inputs, tokens
    )
    streams = [Stream(part) for part in parts]
    return Shapes(inputs, streams, x, bank.k, y, memory.c_mem, cache[0], tokens, logits, embedding)
