"""Algorithms as triples of pure functions, `Algorithm(init, rollout, update)`.

- `optimizer`: one way to make and apply an optax optimiser.
- `compressed_moments`: Adam with moments in 2 bytes or 1 byte a parameter.
- `accumulation`: gradients of a batch, some of its rows at a time.
- `in_place`: how a host loop compiles a step.
- `trained`: a whole model or an adapter on a frozen one, in every algorithm.
- `likelihood`: log-probabilities of whole sequences.
- `sft`: supervised fine-tuning.
- `reward_modeling`: Bradley-Terry reward models; an ensemble is a `vmap`.
- `dpo`: direct preference optimisation, from pairs without a reward model.
- `ppo`: proximal policy optimisation with a KL penalty.
- `grpo`: group relative policy optimisation; `on_policy`: what it shares with PPO.
- `rewarded`: an on-policy algorithm and its reward as one step, for the host loop.
- `fit`: many updates over data in memory as one scan.
- `compose`: algorithm, scorer and transform as one step.
"""
