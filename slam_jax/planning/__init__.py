"""Planning: memory, operations and communication of a run, without its devices."""

from slam_jax.planning.machine import Machine
from slam_jax.planning.meshes import Found, search
from slam_jax.planning.plans import Plan, plan, plan_step, subject_of
from slam_jax.planning.report import describe, describe_search
from slam_jax.planning.subjects import LanguageRun, SlamV3Run

__all__ = [
    "Found",
    "LanguageRun",
    "Machine",
    "Plan",
    "SlamV3Run",
    "describe",
    "describe_search",
    "plan",
    "plan_step",
    "search",
    "subject_of",
]
