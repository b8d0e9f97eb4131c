"""Which of the packages that all benchmarks need are missing; imports none of them."""

import importlib.util

# The second line: what those of the first import.
NEEDED = (
    *("jax", "numpy", "absl-py", "chex", "einops", "flax", "jaxtyping", "optax"),
    *("msgpack", "PyYAML", "rich", "toolz", "treescope", "typing_extensions", "wadler_lindig"),
)
_MODULES = {"absl-py": "absl", "PyYAML": "yaml"}


def complaint() -> str:
    """A line that says which are missing; empty if none is."""
    missing = [name for name in NEEDED if not importlib.util.find_spec(_MODULES.get(name, name))]
    if not missing:
        return ""
    return (
        f"error: {', '.join(missing)}: not installed; the benchmarks need {', '.join(NEEDED)}; "
        f"run pip install {' '.join(missing)}"
    )
