"""Losses and their ingredients: arrays and masks in, arrays out; none of them calls a model.

Modules:
    reduce: named reductions of per-token values, as a total and a weight.
    logprobs: log-probability of the token taken, and entropy, from logits.
    kl: the k1, k2 and k3 estimates of the divergence from the reference, and controllers of its coefficient.
    advantages: rewards per token, generalised advantage estimation, whitening.
    credit: advantages of methods without a value net, from groups, the batch, or a greedy response.
    policy: ratios, surrogates, and the metrics of the ratio.
    value: the clipped value loss and its metrics.
    reward: the Bradley-Terry loss of reward models and the accuracy on preferences; smoothing: labels that follow the
        model.
    attributes: likelihoods of ratings, quantiles, and preferences between uncertain rewards.
    preference: losses on pairs of completions against a reference; chi_squared, reference_free: others of them.
    preference_choices: all of these by name.
    nash: the loss of Nash-MD.
    imitation: weights and selection of good samples, and their weighted likelihood.
    unpaired: Kahneman-Tversky optimisation of single completions.
"""
