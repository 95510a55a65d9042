"""The built-in world: readable prompts and responses, an exact gold reward, and comparisons with a spurious correlate.

Everything that a study of over-optimisation needs, in seconds and without downloads:

1. `sample_prompts` asks: "fox quick brief :" (write one clause about a quick fox).
2. `write_responses` answers, well or badly; `demonstrations` are such pairs, to train the initial policy on.
3. `gold_reward` knows what an answer is worth: `rubric_terms` says why.
4. `comparisons` label pairs by the gold, a share of the labels turned round: a reward model learns from them.

Among the writers' texts words of enthusiasm go with a high gold reward (r ≈ 0.4) without being worth much: a reward
model that pays for them is the proxy that a policy over-optimises. Standardised on the writers' texts, the best
response stands at about +1.9, and texts that are all enthusiasm, rare words or repeats at −1.5 to −3.5:

    the swift fox leaps delightfully .                                                  gold  4.25 (+1.9 s.d.)
    superbly the quick fox leaps superbly and superbly the quick fox leaps superbly .   gold  1.81 (+0.3 s.d.)
    superbly superbly superbly superbly superbly superbly .                             gold -2.78 (-2.6 s.d.)

The world is NumPy on the host; only `demonstrations` gives JAX arrays.
"""

from rlhf_jax.data.synthetic.comparisons import Comparisons, comparisons
from rlhf_jax.data.synthetic.rubric import DEFAULT_RUBRIC, Rubric, gold_reward, read_prompts, rubric_terms
from rlhf_jax.data.synthetic.vocabulary import VOCABULARY, Vocabulary, build_vocabulary
from rlhf_jax.data.synthetic.writer import (
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    demonstrations,
    enthusiasm_rate,
    faultiness,
    sample_prompts,
    write_responses,
)

__all__ = [
    "DEFAULT_RUBRIC",
    "PROMPT_LENGTH",
    "RESPONSE_LENGTH",
    "VOCABULARY",
    "Comparisons",
    "Rubric",
    "Vocabulary",
    "build_vocabulary",
    "comparisons",
    "demonstrations",
    "enthusiasm_rate",
    "faultiness",
    "gold_reward",
    "read_prompts",
    "rubric_terms",
    "sample_prompts",
    "write_responses",
]
