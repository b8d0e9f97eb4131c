"""What each filter leaves of a distribution, and what the repetition penalty does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax.generation import Sampling
from slam_jax.generation.sampling import choose, keep_allowed

PROBS = np.array([0.5, 0.25, 0.15, 0.07, 0.03])


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, 5),
        ({"top_k": 2}, 2),
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.76}, 3),
        ({"top_p": 0.0}, 1),
        ({"min_p": 0.2}, 3),
        ({"min_p": 1.0}, 1),
        # After top-k the first two have 2/3 and 1/3 of what is left.
        ({"top_k": 2, "top_p": 0.6}, 1),
    ],
)
def test_filters_keep_the_most_probable_tokens(fields, kept):
    left = keep_allowed(jnp.log(jnp.float32(PROBS)), Sampling(**fields).rules)
    assert jnp.isfinite(left).tolist() == [i < kept for i in range(5)]


def test_a_token_that_came_before_is_divided_or_multiplied_by_the_penalty():
    keys = jnp.broadcast_to(jax.random.key(0), (2,))
    logits = jnp.array([[3.0, 2.0, -1.0], [-3.0, -1.0, -1.5]])
    seen = jnp.array([[True, False, False], [False, True, False]])
    assert choose(logits, seen, keys, Sampling().rules).tolist() == [0, 1]
    assert choose(logits, seen, keys, Sampling(repetition_penalty=1.6).rules).tolist() == [1, 2]
