"""One name for what crosses a public border: an array of JAX or of NumPy."""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
