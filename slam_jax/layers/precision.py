"""The dtype in which sums, norms and softmaxes are computed, and the precision of products."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def upcast(dtype: Any) -> Any:
    """float32, or `dtype` where that has more bits."""
    return jnp.promote_types(dtype, jnp.float32)


def widen(tree: Any) -> Any:
    """The arrays in float32, or as they are where they have more bits."""
    return jax.tree.map(lambda x: x.astype(upcast(x.dtype)), tree)


def precise(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a model, whose products of matrices have the precision of `self.config`."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.config.precision():
            return method(self, *args, **kwargs)

    return call
