"""Gates: what papers on reward models claim, run over seeds, and whether it holds here.

- `gate`: the record of a gate, one number a seed beside its threshold.
- `report`: runs them by stage; tables and figures.
- `benchmarks`, `votes`: which score of a benchmark predicts the policy (PPE, RMB), and voting judges.
- `rare_arm`, `smoothing`: Iterative Data Smoothing.
- `ratings`: Gaussian attribute heads (URM, URME).
- `cheap_ensembles`: linear-head and LoRA ensembles.
- `lengths`: what a policy gains by length.
- `world`: what those on the built-in world share.
"""
