"""Diagrams of a SLAM v3, drawn from its modules."""

from slam_jax.reporting.diagrams.figures import draw_diagrams, draw_workdir

__all__ = ["draw_diagrams", "draw_workdir"]
