"""How far the policy went, what it gained by the gold reward, and with what error bars.

`statistics` has intervals, paired differences and bootstraps; `overoptimization` fits scaling laws of gold against √KL;
`trajectories` measures the fall from the peak and compares runs at matched KL; `frontier` compares algorithms at equal
samples and at equal KL; `figures` draws. All of it runs on the host, in float64, on numbers that a run has left behind.
"""
