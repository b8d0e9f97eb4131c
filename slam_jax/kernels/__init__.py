"""Forms that exist for speed alone, each in one file with its plain twin.

Layers say the mathematics and pick a form here in one line. A test compares each form with its
twin, in values and gradients, and a row of docs/speed.md says what it buys.
"""
