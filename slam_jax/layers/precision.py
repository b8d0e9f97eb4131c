"""The dtype in which sums, norms and softmaxes are computed."""

from typing import Any

import jax.numpy as jnp


def upcast(dtype: Any) -> Any:
    """float32, or `dtype` where that has more bits."""
    return jnp.promote_types(dtype, jnp.float32)
