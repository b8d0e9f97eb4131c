"""The cache of compiled executables on disk."""

import contextlib
import os
import pathlib

import jax


def enable_compile_cache() -> None:
    """Keeps compiled executables on disk, so that a later process does not compile them again.

    They go to $SLAM_JAX_CACHE_DIR, by default ~/.cache/slam_jax/xla. A cache directory that JAX
    already has is left alone. Call it before the first compilation.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    directory = pathlib.Path(os.environ.get("SLAM_JAX_CACHE_DIR") or "~/.cache/slam_jax/xla")
    with contextlib.suppress(RuntimeError, OSError):  # no home folder, or it is read-only
        directory = directory.expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(directory))
