"""The verifiable toy as a setting."""

import numpy as np

from rlhf_jax.data.synthetic.modular import ModularSums
from rlhf_jax.laboratory.sums import modular_world

TASK = ModularSums(modulus=3, terms=2)


def test_held_out_prompts_are_others_and_gold_is_the_checkers():
    world = modular_world(TASK, 5, 4, seed=0)
    rows = np.concatenate([np.asarray(world.prompts.tokens), np.asarray(world.held_out.tokens)])
    assert len(np.unique(rows, axis=0)) == 9
    right = rows[:, :2].sum(axis=1) % 3
    tokens = np.column_stack([right, np.full(9, TASK.stop_token), np.full(9, TASK.pad_token)]).astype(np.int32)
    mask = tokens != TASK.pad_token
    assert world.gold(rows, tokens, mask).tolist() == [1.0] * 9
    mask[3] = False
    assert world.gold(rows, tokens, mask).tolist() == [1.0] * 3 + [0.0] + [1.0] * 5
    (prompt, response), *_ = world.read(rows, rows >= 0, tokens, mask)
    assert prompt == f"{rows[0, 0]} + {rows[0, 1]} ="
    assert response == f"{right[0]} ."
