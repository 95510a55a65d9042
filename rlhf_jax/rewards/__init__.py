"""What a reward model says, and how far it is believed.

Scorers turn sequences into a `Score`; transforms (`ensemble`, `last_layer`) turn a `Score` into the reward that a
policy is trained on. A transform is a pair of pure functions `Transform(init, apply)`; its coefficients, geometry and
running averages are arrays in its state, so that one compiled program serves a whole sweep (`vmap` or `lax.map` over
states), and `transforms.select` lets one program serve several methods. The gold reward is never an argument of a
transform: it scores stored samples afterwards.

Kinds of reward models, each a record of parameters and a scorer: `bradley_terry` (one head; full models stacked),
`linear_ensemble`, `lora_ensemble`, `dropout` and `averaging` (several, in one or as one), `posterior` (what the last
layer has seen), `gaussian`, `quantile` and `probabilistic` (a distribution). `members` makes one scorer of several.
"""
