"""Running functions on many seeds and many devices.

- `lanes`: one program for all seeds and coefficients of a study; the one place that chooses how they are batched.
"""
