"""A chat in the terminal; start it with `python -m slam_jax.serving.chat`."""
