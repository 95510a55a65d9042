"""Plans for machines that we do not have: does a step fit, how long does it take, what decides that.

- `hardware`: chips, slices, and devices to compile for.
- `programs`: a phase of a step, compiled ahead of time, and what the compiler says of it.
- `hlo`, `collectives`, `traffic`: what the compiled text says, loops counted as often as they run.
- `flops`: the arithmetic of a model, from its shape.
- `estimate`: bytes against HBM, seconds a step, the smallest slice that fits.
- `report`: tables, JSON and a figure.
- `published`: shapes of well-known models.

A plan takes functions and shapes; `experiments/plan.py` makes them from the algorithms.
"""
