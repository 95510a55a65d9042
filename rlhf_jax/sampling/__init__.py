"""Drawing responses.

- `filters`: `SamplingConfig`, and temperature, top-k, top-p and min-p as functions of logits.
- `generate`: prompts in, a `Rollout` out, in one compiled loop with a key-value cache.
- `queue`: the same, a few responses at a time; `mixture`: from two policies.
- `decoding`: what these share.
- `best_of_n`: the unbiased best-of-n estimator.
"""
