"""Faster blocks for the CPU, equal to the reference's up to rounding, in the form that the model
takes as `blocks`. Numba compiles them. Deleting this folder leaves everything working, only slower.
"""
