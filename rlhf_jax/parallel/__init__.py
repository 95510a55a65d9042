"""Running functions on many seeds, many devices and several hosts.

- `mesh`: how many devices work along each axis, and what a mesh must divide.
- `sharding`: where every array of a state lies, and ways to put it there.
- `distributed`: several processes as one run: how they find each other, who writes and prints, how they part.
- `meetings`: what processes tell one another: values they agree on, errors that concern all, arrays in whole.
- `plan`: does a step fit a machine that we do not have, and how long does it take?
- `lanes`: one program for all seeds and coefficients of a study; the one place that chooses how they are batched.
"""
