"""Drawing responses.

- `filters`: `SamplingConfig`, and temperature, top-k, top-p and min-p as functions of logits.
- `generate`: prompts in, a `Rollout` out, in one compiled loop with a key-value cache.
- `best_of_n`: the unbiased best-of-n estimator.
"""
