"""A verifiable toy: sums modulo p, worked out step by step, with a checker that says of every step whether it is right.

    5 + 4 + 6 + 2 =                                                                            (the prompt)
    2 1 3 .                 the sums so far, 5 + 4, 5 + 4 + 6, …, modulo 7, then the stop       (reward 1)
    2 4 6 .                 a slip at the second step, carried on                               (reward 1/6)
    2 1 3 3 .               all steps right, but it does not stop                               (reward 1/2)

The token of a number is the number; "=", the stop "." and padding follow; the "+" are understood.
`modular_demonstrations` slip often and carry on from their slip: a policy that is fine-tuned on them knows how to add,
but does it badly until it is paid for being right. The checker is JAX on tokens, so that it can be compiled into a
training step.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.types import Demonstrations, Params, Prompts, Score


@dataclasses.dataclass(frozen=True)
class ModularSums:
    """Which sums are asked for.

    Attributes:
        modulus: p; numbers are 0 … p − 1.
        terms: numbers in a prompt, at least 2.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> task = ModularSums(modulus=7, terms=4)
        >>> task.vocabulary, task.prompt_length, task.steps, task.response_length
        (10, 5, 3, 5)
    """

    modulus: int = 7
    terms: int = 4

    def __post_init__(self):
        if self.modulus < 2 or self.terms < 2:
            raise ValueError(
                f"a sum modulo {self.modulus} of {self.terms} terms has no steps to check; give at least 2 of each."
            )

    @property
    def vocabulary(self) -> int:
        """Number of tokens V: the numbers, "=", the stop and padding."""
        return self.modulus + 3

    @property
    def stop_token(self) -> int:
        """The token that ends a response."""
        return self.modulus + 1

    @property
    def pad_token(self) -> int:
        """What is written after the stop."""
        return self.modulus + 2

    @property
    def prompt_length(self) -> int:
        """P: the numbers and "="."""
        return self.terms + 1

    @property
    def steps(self) -> int:
        """S: sums to be written."""
        return self.terms - 1

    @property
    def response_length(self) -> int:
        """T: the steps, the stop, and room for one step too many."""
        return self.steps + 2


def modular_prompts(rng: np.random.Generator, task: ModularSums, n: int) -> Prompts:
    """Different prompts in random order, `Prompts` [N, P] without padding.

    Args:
        rng: the source of randomness.
        task: which sums.
        n: how many prompts (N).

    Raises:
        ValueError: there are not as many.

    Example:
        >>> task = ModularSums(modulus=7, terms=3)
        >>> prompts = modular_prompts(np.random.default_rng(0), task, 2)
        >>> [read_tokens(task, row) for row in np.asarray(prompts.tokens)]
        ['3 + 6 + 5 =', '1 + 3 + 4 =']
    """
    every = task.modulus**task.terms
    if not 1 <= n <= every:
        raise ValueError(
            f"{n} prompts were asked for; sums of {task.terms} numbers modulo {task.modulus} have {every}."
        )
    chosen = rng.choice(every, n, replace=False)
    digits = chosen[:, None] // task.modulus ** np.arange(task.terms) % task.modulus
    tokens = _asked(task, digits)
    return Prompts(tokens=jnp.asarray(tokens), mask=jnp.ones(tokens.shape, bool), index=jnp.arange(n, dtype=jnp.int32))


def running_sums(task: ModularSums, prompts: Int[Array, "B P"]) -> Int[Array, "B S"]:
    """The right steps: s_t, the sum of the first t + 1 numbers modulo p, for t = 1 … S."""
    return (jnp.cumsum(prompts[:, :-1], axis=1) % task.modulus)[:, 1:]


def step_labels(task: ModularSums, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Bool[Array, "B S"]:
    """Which steps of a response are right: step t is, if it is s_t. Steps that were not written are not.

    A step that carries on from a wrong one is wrong, unless a second slip makes up for the first.

    Args:
        task: which sums.
        tokens: prompt and response side by side, L = P + T.
        mask: True on real tokens.

    Example:
        >>> task = ModularSums(modulus=7, terms=3)
        >>> tokens = jnp.array([[5, 4, 6, 7, 2, 4, 8, 9]])  # 5 + 4 + 6 = 2 4 .
        >>> step_labels(task, tokens, tokens != task.pad_token).tolist()
        [[True, False]]
    """
    written = slice(task.prompt_length, task.prompt_length + task.steps)
    right = tokens[:, written] == running_sums(task, tokens[:, : task.prompt_length])
    return right & mask[:, written]


def modular_reward(task: ModularSums, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, " B"]:
    """The reward of a response, between 0 and 1.

        R = 1/2 (1/S) sum_t right_t + 1/2 [step S is right and the stop follows it]

    It is 1 for the S right steps and then the stop, and for nothing else.

    Args:
        task: which sums.
        tokens: prompt and response side by side, L = P + T with T > S.
        mask: True on real tokens.

    Example:
        >>> task = ModularSums(modulus=7, terms=3)
        >>> tokens = jnp.array([[5, 4, 6, 7, 2, 1, 8], [5, 4, 6, 7, 3, 1, 8]])  # 5 + 4 + 6 = 2 1 . and = 3 1 .
        >>> modular_reward(task, tokens, jnp.ones(tokens.shape, bool)).tolist()
        [1.0, 0.75]
    """
    right = step_labels(task, tokens, mask)
    end = task.prompt_length + task.steps
    stops = (tokens[:, end] == task.stop_token) & mask[:, end]
    answered = (right[:, -1] & stops).astype(jnp.float32)
    return 0.5 * right.astype(jnp.float32).mean(axis=1) + 0.5 * answered


def modular_scorer(task: ModularSums) -> Callable[[Params, Array, Array], Score]:
    """The checker as a scorer, `score(params, tokens, mask) -> Score`; it has no parameters: pass ()."""

    def score(params: Params, tokens: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Score:
        del params
        return Score(mean=modular_reward(task, tokens, mask))

    return score


def modular_demonstrations(rng: np.random.Generator, task: ModularSums, n: int, slips: float) -> Demonstrations:
    """Worked sums by someone who slips: each step adds the next number to the one before, or is any number at all.

    Args:
        rng: the source of randomness.
        task: which sums.
        n: how many sequences (N), prompts drawn with replacement.
        slips: probability in [0, 1] that a step is drawn uniformly from all p numbers instead.

    Returns:
        `Demonstrations` [N, P + T], responses of S steps and the stop; the loss falls on the response.

    Raises:
        ValueError: `slips` is no probability, or n is below 1.
    """
    if not 0.0 <= slips <= 1.0 or n < 1:
        raise ValueError(f"{n} demonstrations with slips = {slips}: give at least 1, and a probability in [0, 1].")
    prompts = _asked(task, rng.integers(task.modulus, size=(n, task.terms)))
    responses = np.full((n, task.response_length), task.pad_token, np.int32)
    before = prompts[:, 0]
    for step in range(task.steps):
        right = (before + prompts[:, step + 1]) % task.modulus
        before = np.where(rng.random(n) < slips, rng.integers(task.modulus, size=n), right)
        responses[:, step] = before
    responses[:, task.steps] = task.stop_token
    tokens = np.concatenate([prompts, responses], axis=1)
    mask = tokens != task.pad_token
    is_response = np.arange(tokens.shape[1]) >= task.prompt_length
    return Demonstrations(
        tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), loss_mask=jnp.asarray(mask & is_response[None])
    )


def read_tokens(task: ModularSums, tokens: Int[np.ndarray, " L"]) -> str:
    """One sequence as text; padding is left out, and a "+" stands between the numbers of a prompt.

    Example:
        >>> read_tokens(ModularSums(modulus=7, terms=3), np.array([5, 4, 6, 7, 2, 1, 8, 9]))
        '5 + 4 + 6 = 2 1 .'
    """
    words = (*map(str, range(task.modulus)), "=", ".")
    text = " ".join(words[token] for token in tokens if token != task.pad_token)
    prompt, equals, response = text.partition(" =")
    return prompt.replace(" ", " + ") + equals + response if equals else text


def _asked(task: ModularSums, numbers: Int[np.ndarray, "N terms"]) -> Int[np.ndarray, "N P"]:
    """Prompts that ask for the sums of numbers."""
    return np.column_stack([numbers, np.full(len(numbers), task.modulus)]).astype(np.int32)
