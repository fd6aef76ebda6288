"""Slow, readable NumPy in float64: what every operator has to compute. Nothing here imports torch or a kernel.

Each function takes `dtype`, the dtype of all its arithmetic: float64 is the oracle; float32 gives the baseline error
that a kernel is allowed to double (tests/budget.py).
"""
