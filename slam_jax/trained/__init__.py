"""Trained models as folders that can be shared: weights, configuration, tokenizer, model card.

The models in `SHIPPED` come with the package, and `slam_jax.load` takes their names.
"""

from slam_jax.trained.folder import SHIPPED, Trained, find_folder, read_folder, write_folder

__all__ = ["SHIPPED", "Trained", "find_folder", "read_folder", "write_folder"]
