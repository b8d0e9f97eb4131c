"""An HTTP server that speaks the protocol of OpenAI; start it with `python -m slam_jax.serving`."""
