"""Algorithms as triples of pure functions, `Algorithm(init, rollout, update)`.

- `optimizer`: one way to make and apply an optax optimiser.
- `sft`: supervised fine-tuning.
- `reward_modeling`: Bradley-Terry reward models; an ensemble is a `vmap`.
- `ppo`: proximal policy optimisation with a KL penalty.
- `fit`: many updates over data in memory as one scan.
- `compose`: algorithm, scorer and transform as one step.
"""
