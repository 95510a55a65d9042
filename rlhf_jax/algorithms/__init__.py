"""Algorithms as triples of pure functions, `Algorithm(init, rollout, update)`.

- `optimizer`: one way to make and apply an optax optimiser.
- `accumulation`: gradients of a batch, some of its rows at a time.
- `in_place`: how a host loop compiles a step.
- `trained`: a whole model or an adapter on a frozen one, in every algorithm.
- `likelihood`: log-probabilities of whole sequences.
- `sft`: supervised fine-tuning.
- `reward_modeling`: Bradley-Terry reward models, with soft or smoothed labels; an ensemble is a `vmap`.
- `ensemble_modeling`: many heads on one trunk, and adapters of their own for them.
- `attribute_modeling`: reward models that predict a distribution, from ratings or preferences; `distributions`: what
  these trainings share.
- `preference`: DPO and the losses beside it, from pairs without a reward model; `kto`: from single completions.
- `on_policy`: the one engine of algorithms that sample; `rollouts`: what they read off a rollout.
- `ppo`: proximal policy optimisation, with a value net.
- `policy_gradient`: GRPO and its relatives without one; `methods`: their pieces, in one table.
- `imitation`: VAR, RAFT, SuperHF, best-of-n distillation.
- `online_preference`: online DPO, XPO, Nash-MD.
- `rewarded`: an on-policy algorithm and its reward as one step, for the host loop.
- `fit`: many updates over data in memory as one scan.
- `compose`: algorithm, scorer and transform as one step.
"""
