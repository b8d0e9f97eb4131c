"""A page to talk to a trained model: python -m slam_jax.demo --workdir=DIR"""
