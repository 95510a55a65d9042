"""The over-optimisation laboratory: train policies on reward models that are wrong in places, and ask the gold reward.

The way of a study, one module a stage:

- `options`: every option, and what is refused before anything is computed.
- `setting`: the world, the policy that starts in it, the trunks of its reward models.
- `proxies`: noisy comparisons, the reward models trained on them, and their last-layer geometry.
- `neural_gold`: a gold reward that is itself a model.
- `policies`: best-of-n, and PPO on all reward rules, KL coefficients and seeds as lanes of one program.
- `findings`: the gold reward of what the policies wrote; curves and samples.

Algorithms are compared in the same settings, and in a verifiable one:

- `arms`: every algorithm by name, with its customary options.
- `comparison`: one algorithm's seeds as lanes of one program, and how all of them are measured.
- `sums`: modular sums as a setting, where a checker is the reward.

Kinds of reward models are compared at equal labels, each under every reward rule that it can serve:

- `uncertain_kinds`, `rated_kinds`: the kinds and how they are trained; `last_layers`: geometries of their heads.
- `uncertainty_study`: rules and seeds of a kind as lanes; `uncertainty_panel`: what all kinds are asked about.
- `uncertain_picks`: best-of-n by the rules of an ensemble, and how far its members part.
- `uncertainty_gates`, `gates`: what papers claim of them, judged; `uncertainty_report`: tables and figures.

Theory of in-context learning: `theory` runs an experiment stage by stage, `classification_panels` draws one. `stages`
is the loop over stages that it shares with `gates`.
"""
