"""Trained models as folders that can be shared: weights, configuration, tokenizer, model card.

Those in the folders beside this file come with the package, and `slam_jax.load` takes their names.
"""
