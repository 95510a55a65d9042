"""Scores of a reward model of any kind for completions that are there already, each behind its prompt.

source = open_source(options)                                # options.model is the reward model's folder
examples, _ = read_completions(source, flat, options.chat)   # rows of one completion each, as tokens
scores = load_scorer(options, source)(examples, len(flat.values))
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlhf_jax.data.batches import pad_demonstrations
from rlhf_jax.data.formats import Rows, as_chats
from rlhf_jax.data.tokenization import Demonstration, Examples, tokenize_demonstrations
from rlhf_jax.models.huggingface import load_tokenizer
from rlhf_jax.models.huggingface.folders import local_folder
from rlhf_jax.models.huggingface.load import HEAD_FILE
from rlhf_jax.models.huggingface.tensors import locate_all
from rlhf_jax.rewards.bradley_terry import check_rewards, member_score
from rlhf_jax.rewards.ensemble import member_offset
from rlhf_jax.rewards.posterior import PosteriorParams, whitened
from rlhf_jax.training.held_out import over_rows
from rlhf_jax.training.options import SourceOptions
from rlhf_jax.training.progress import ProgressReport
from rlhf_jax.training.reward_folders import load_reward_folder
from rlhf_jax.training.reward_models import check_no_prompt_gate
from rlhf_jax.training.sources import Source, collate_for, placement
from rlhf_jax.types import Params, Score

Numbers = Float[np.ndarray, " N"]


class CompletionScores(NamedTuple):
    """What a reward model says of N completions; NaN where it cannot read one.

    Attributes:
        mean: the scores, float32 [N].
        epistemic: standard deviation for what the model was not taught, [N]; None where nothing measures it.
        aleatoric: standard deviation for what the data leave open, [N]; None likewise.
        members: scores of ensemble members, [M, N]; None for one model.
        whitened: features in units of their uncertainty, of one head with a posterior (`posterior.whitened`), float32
            [D, N]; None for other models, and where nobody asks how uncertain margins are.
    """

    mean: Numbers
    epistemic: Numbers | None = None
    aleatoric: Numbers | None = None
    members: Float[np.ndarray, "M N"] | None = None
    whitened: Float[np.ndarray, "D N"] | None = None


def check_head(folder: str) -> None:
    """Refuses a folder without a trained head, whose scores would be random; reads no parameters.

    Raises:
        ValueError: there is no such folder, or no head in it.
    """
    path = local_folder(folder)
    if not {"score.weight", "classifier.weight"} & locate_all(path).keys() and not (path / HEAD_FILE).is_file():
        raise ValueError(
            f"{folder} has no reward head (neither score.weight nor classifier.weight nor a file {HEAD_FILE}), so its "
            "scores would be random: give a reward model, as experiments/reward_model.py writes it."
        )


def read_completions(source: Source, flat: Rows, chat: bool = False, cut: bool = False) -> tuple[Examples, int]:
    """Completions behind their prompts as tokens; those that are too long or empty are left out and counted.

    Args:
        source: the reward model's tokenizer, and the most tokens that it reads.
        flat: rows of the format `prompt_completion`.
        chat: whether texts are turned into turns of a chat.
        cut: whether those that are too long are read in part. Of the completion that is its first tokens and its last
            one (an EOS token, where reward models read the score), as many as the prompt leaves room for, and if the
            prompt is long as many as half of the longest length. The prompt gives way on its left, and keeps the BOS
            token: completions of a long prompt still differ.

    Returns:
        The completions that are read, and how many of them were cut.

    Raises:
        ValueError: see `tokenize_demonstrations`.
    """
    flat = as_chats(flat) if chat else flat
    longest = sys.maxsize if cut else source.longest
    examples = tokenize_demonstrations(flat, source.tokenizer, longest, vocab_size=source.config.vocab_size)
    shorter = sum(item.length > source.longest for item in examples.items)
    bos = source.tokenizer.bos_token_id
    return examples._replace(items=[_cut(item, source.longest, bos) for item in examples.items]), shorter


def _cut(item: Demonstration, longest: int, bos: int | None) -> Demonstration:
    if item.length <= longest:
        return item
    start = int(item.loss_mask.argmax())
    room = min(item.length - start, max(longest - start, longest - longest // 2))
    first = int(longest > room and item.tokens[0] == bos)
    prompt = [*range(first), *range(start - (longest - room - first), start)]
    places = [*prompt, *range(start, start + room - 1), item.length - 1]
    return Demonstration(*(values[places] for values in item))


def load_scorer(
    options: SourceOptions, source: Source, pairs: bool = False
) -> Callable[[Examples, int], CompletionScores]:
    """Reads a reward model of any kind, see `reward_folders`.

    Args:
        options: how it is read and run; `model` is its folder.
        source: `open_source(options)`.
        pairs: whether it is asked how uncertain margins are: then a posterior gives `whitened` too, which is 4 D bytes
            of memory a completion (10 000 completions of a model of width 4096: 164 MB).

    Returns:
        `score(examples, count)`: the scores of `count` completions, of which `examples` are those that are read.

    Raises:
        ValueError: the folder cannot be used; its uncertainty was made with another chat template than the one given;
            or (when it scores) a score is not finite.
    """
    check_no_prompt_gate(str(source.folder))
    folder = load_reward_folder(source.folder, options.dtype, options.param_dtype, placement())
    given = source.tokenizer.chat_template
    if folder.kind != "bradley_terry" and given != load_tokenizer(source.folder).chat_template:
        raise ValueError(
            f"the uncertainty of {options.model} was made with the chat template of its folder: leave out "
            "--chat-template, or make the uncertainty again with that one."
        )

    @jax.jit
    def parts(params, tokens, mask):
        return by_completion(folder.scorer(params, tokens, mask), params if pairs else None)

    def score(examples: Examples, count: int) -> CompletionScores:
        collate = collate_for(pad_demonstrations, source, examples.items)
        batches = math.ceil(len(examples.items) / options.batch_size)
        with ProgressReport("batches", batches) as progress:

            def of_batch(batch):
                progress.advance()
                return parts(folder.params, batch.tokens, batch.mask)

            found = over_rows(of_batch, examples.items, collate, options.batch_size)
        for name, values in found.items():
            check_rewards(values, f"the reward model {options.model} ({name})")
        return as_scores({name: _whole(values, examples.rows, count) for name, values in found.items()})

    return score


def by_completion(score: Score, params: Params = None) -> dict[str, Array]:
    """What a Score has of each completion, by the names of `CompletionScores`: axis 0 counts the completions.

    Args:
        score: of a batch.
        params: of its reward model, of which a posterior gives `whitened`; None: that is not asked for.
    """
    members = None if score.members is None else score.members.T
    named = {"mean": score.mean, "epistemic": score.epistemic, "aleatoric": score.aleatoric, "members": members}
    if isinstance(params, PosteriorParams):
        named["whitened"] = whitened(params, score.features)
    return {name: values for name, values in named.items() if values is not None}


def as_scores(found: Mapping[str, np.ndarray]) -> CompletionScores:
    """The scores that `by_completion` took apart, of all batches."""
    return CompletionScores(**{name: values.T for name, values in found.items()})


def _whole(values: np.ndarray, rows: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    whole = np.full((count, *values.shape[1:]), np.nan, np.float32)
    whole[np.asarray(rows)] = values
    return whole


def as_ensemble(
    models: Sequence[CompletionScores], reference: Sequence[CompletionScores] | None = None
) -> CompletionScores:
    """Several reward models as one ensemble: their average, and the standard deviation over them.

    What the data leave open is, by the law of total variance, the root of the mean of the members' aleatoric variances;
    there is none where a member has none. How unsure a member is of its own mean is left out.

    Each counts from its mean over the reference completions that all of them read, which a Bradley-Terry reward is free
    up to. Scores that are compared with each other need the same reference: if new data were their own, that members
    part there would not count as disagreement.

    Args:
        models: scores of the same completions, M ≥ 1.
        reference: the same models' scores of reference completions; None: `models`.

    Returns:
        Scores with members; NaN where a model could not read a completion.

    Example:
        >>> first, second = np.array([0.0, 2.0], np.float32), np.array([10.0, 16.0], np.float32)
        >>> found = as_ensemble([CompletionScores(first), CompletionScores(second)])
        >>> found.mean.tolist(), found.epistemic.tolist()
        ([-2.0, 2.0], [1.0, 1.0])
    """
    members, known = (np.stack([model.mean for model in each]) for each in (models, reference or models))
    read, count = np.flatnonzero(~np.isnan(members).any(axis=0)), members.shape[1]
    offset = member_offset(jnp.asarray(known[:, ~np.isnan(known).any(axis=0)]))
    found = member_score(jnp.asarray(members[:, read]), None, offset, None)
    if all(model.aleatoric is not None for model in models):
        squares = np.square([model.aleatoric[read] for model in models])
        found = found.replace(aleatoric=jnp.asarray(np.sqrt(squares.mean(axis=0))))
    return as_scores({name: _whole(np.asarray(values), read, count) for name, values in by_completion(found).items()})
