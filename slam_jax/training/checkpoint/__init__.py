"""Verified checkpoints; `python -m slam_jax.training.checkpoint` inspects those of a workdir."""

from slam_jax.training.checkpoint.store import CheckpointError, Checkpoints, Step, is_loss

__all__ = ["CheckpointError", "Checkpoints", "Step", "is_loss"]
