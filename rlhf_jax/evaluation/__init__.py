"""How far the policy went, what it gained by the gold reward, how far a reward model can be trusted; with error bars.

`statistics` has intervals, paired differences and bootstraps; `overoptimization` fits scaling laws of gold against √KL;
`trajectories` measures the fall from the peak and compares runs at matched KL; `frontier` compares algorithms at equal
samples and at equal KL; `figures` draws.

Of reward models: `calibration`, `uncertainty` (does it know where it errs?), `judging`, `verdicts`, `official_scores`
(benchmarks), `ppe`, `length` (is it length that is rewarded?), `mismatch` (does its accuracy tell what a policy will
gain?); `sheets` and `model_measures` put them together for one file of judged rows, `overview` and `model_report` show
them; `uncertainty_figures` compares kinds of them.

All of it runs on the host, in float64, on numbers that a run has left behind.
"""
