"""In what sums, norms and softmaxes are computed."""

from typing import Any

import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """float32, or `dtype` where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)
