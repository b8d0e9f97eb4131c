"""The handwritten digits of scikit-learn: 1,797 scanned pictures of 8 x 8 pixels, no download.

Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits" (UCI), test part.
"""

import numpy as np

from slam_jax.data.folder import SPLITS
from slam_jax.data.rows import Row
from slam_jax.errors import ConfigError

_SPLIT_ENDS = (1_257, 1_437, 1_797)
_SEED = 1797


def read_digits() -> dict[str, list[Row]]:
    """Rows by split: 1,257 for training, 180 for validation and 360 for testing, shuffled.

    The prompt is "digit", the answer is the label. All splits have the same writers.

    Raises:
      ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "data.name is 'digits', which scikit-learn has, and it is not installed: "
            "`pip install 'slam_jax[digits]'`"
        ) from None
    images, labels = load_digits(return_X_y=True)
    pixels = (np.asarray(images) * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)
    answers = [(str(label),) for label in np.asarray(labels)]
    order = np.random.default_rng(_SEED).permutation(len(pixels))
    rows = [Row(pixels[i], None, None, "digit", answers[i]) for i in order]
    bounds = zip(SPLITS, (0, *_SPLIT_ENDS), _SPLIT_ENDS, strict=False)
    return {split: rows[start:end] for split, start, end in bounds}
