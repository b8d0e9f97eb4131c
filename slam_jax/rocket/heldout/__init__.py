"""The held-out comparison: real text, equal budgets, intervals."""
