"""The tokens that each filter keeps, and the effect of the repetition penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slam_jax.errors import InputError
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
    order = np.array([3, 0, 4, 1, 2])
    logits = jnp.log(jnp.float32(PROBS))
    left = keep_allowed(logits[order], Sampling(**fields).rules)
    np.testing.assert_array_equal(left, np.where(order < kept, logits[order], -np.inf))


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"temperature": 1e-4}, {"temperature": 0.0}),
        ({"top_k": 0}, {"top_k": None}),
        ({"top_k": -1}, {"top_k": None}),
    ],
)
def test_the_usual_spellings_of_greedy_and_off_are_understood(fields, same):
    assert Sampling(**fields).rules == Sampling(**same).rules


@pytest.mark.parametrize(("field", "value"), [("temperature", -1e-4), ("top_k", -2)])
def test_other_numbers_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field} is {value}; expected"):
        Sampling(**{field: value})


def test_two_nearly_equal_logits_may_change_places_without_another_choice():
    """In bfloat16 rounding depends on the size of the batch. The noise belongs to a token id."""
    logits = np.random.default_rng(0).normal(size=(64, 200)).astype(np.float32)
    best, second = np.argsort(-logits, axis=-1)[:, :2].T
    rows = np.arange(64)
    logits[rows, second] = logits[rows, best] - 1e-6
    swapped = logits.copy()
    swapped[rows, second] += 2e-6
    keys = jax.random.split(jax.random.key(0), 64)
    rules = Sampling(temperature=1.0).rules
    one, other = (
        choose(x, jnp.zeros_like(x, bool), keys, rules) for x in map(jnp.array, (logits, swapped))
    )
    assert (one != best).sum() > 32
    np.testing.assert_array_equal(one, other)


def test_a_token_that_came_before_is_divided_or_multiplied_by_the_penalty():
    keys = jnp.broadcast_to(jax.random.key(0), (2,))
    logits = jnp.array([[3.0, 2.0, -1.0], [-3.0, -1.0, -1.5]])
    seen = jnp.array([[True, False, False], [False, True, False]])
    assert choose(logits, seen, keys, Sampling().rules).tolist() == [0, 1]
    assert choose(logits, seen, keys, Sampling(repetition_penalty=1.6).rules).tolist() == [1, 2]
