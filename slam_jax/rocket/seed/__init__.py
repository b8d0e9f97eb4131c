"""The published comparison, repeated."""
