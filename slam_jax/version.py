"""The version, alone so that packaging reads it without importing JAX."""

__version__ = "0.11.0"
