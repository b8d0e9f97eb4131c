"""Questions as text, answers as text."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from slam_jax.data import Tokenizer
from slam_jax.errors import InputError
from slam_jax.generation.decode import greedy_decode
from slam_jax.protocol import Decodable

_decode = jax.jit(greedy_decode, static_argnames=("max_new_tokens", "eos_id", "pad_id"))


def answer(
    model: Decodable,
    tokenizer: Tokenizer,
    memory: Any,
    prompts: Sequence[Sequence[str]],
    *,
    max_new_tokens: int = 16,
) -> list[list[str]]:
    """The model's most probable continuation of every prompt, up to its end or `max_new_tokens`.

    prompts: for each example of `memory` its questions, as many for one as for the other; all are
    answered from the one encode.

    Raises InputError where there are not as many lists of prompts as examples, or not as many
    prompts for each, at least one.
    """
    if any(isinstance(questions, str) for questions in prompts):
        raise InputError("prompts is a list of texts; give a list of prompts for each example")
    examples = {leaf.shape[0] for leaf in jax.tree.leaves(memory)}
    if examples - {len(prompts)}:
        raise InputError(
            f"prompts for {len(prompts)} examples, and the memory has {examples.pop()}"
        )
    counts = {len(questions) for questions in prompts}
    if len(counts) != 1 or 0 in counts:
        raise InputError(f"examples with {sorted(counts)} prompts; give each as many, one or more")
    rows = [
        [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in questions]
        for questions in prompts
    ]
    longest = max(len(row) for example in rows for row in example)
    pad = tokenizer.pad_id
    tokens = [[row + [pad] * (longest - len(row)) for row in example] for example in rows]
    new = _decode(
        model,
        memory,
        jnp.array(tokens, jnp.int32),
        jnp.array([[len(row) for row in example] for example in rows], jnp.int32),
        max_new_tokens=max_new_tokens,
        eos_id=tokenizer.eos_id,
        pad_id=pad,
    )
    return [[tokenizer.decode(row) for row in example] for example in new.tolist()]
