"""Comparison of two models on the same questions, with paired intervals."""
