"""The handwritten digits of scikit-learn: 1,797 real pictures of 8 x 8 pixels, on disk already.

Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI), test part.
"""

import numpy as np

from slam_jax.data.rows import Row
from slam_jax.errors import ConfigError

PROMPT = "digit"
_ENDS = (1_257, 1_437, 1_797)
_SEED = 1797


def read_digits() -> dict[str, list[Row]]:
    """Rows by split: 1,257 for training, 180 for validation, 360 for testing, chosen at random.

    The same writers are in all three. Raises ConfigError where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "data.name is 'digits', which scikit-learn has, and it is not installed: "
            "`pip install 'slam_jax[digits]'`"
        ) from None
    images, digits = load_digits(return_X_y=True)
    pixels = (np.asarray(images) * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)
    answers = [(str(digit),) for digit in np.asarray(digits)]
    order = np.random.default_rng(_SEED).permutation(len(pixels))
    rows = [Row(pixels[i], None, None, PROMPT, answers[i]) for i in order]
    starts = (0, *_ENDS[:-1])
    names = ("train", "validation", "test")
    return {name: rows[a:b] for name, a, b in zip(names, starts, _ENDS, strict=True)}
