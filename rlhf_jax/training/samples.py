"""Samples as people read them: completions of held-out prompts, and a Markdown file that shows them side by side."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from rlhf_jax.data.batches import left_pad
from rlhf_jax.data.prompts import render
from rlhf_jax.data.tokenization import Demonstration
from rlhf_jax.parallel.distributed import first_process
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate
from rlhf_jax.sampling.stop_tokens import folder_stop_tokens
from rlhf_jax.training.sources import Source
from rlhf_jax.types import Params

# Tokens of a plain text that are shown to the model before it goes on by itself.
_BEGINNING = 16

_generate = partial(jax.jit, static_argnums=(0, 4))(generate)


def prompt_tokens(item: Demonstration) -> Int[np.ndarray, " P"]:
    """What comes before the last completion of a row; of a plain text, its first tokens.

    Example:
        >>> item = Demonstration(np.arange(5, dtype=np.int32), np.array([False, True, False, False, True]))
        >>> prompt_tokens(item).tolist()
        [0, 1, 2, 3]
    """
    prompt_ends = np.flatnonzero(item.loss_mask & ~np.append(False, item.loss_mask[:-1]))
    begin = int(prompt_ends[-1])
    return item.tokens[: begin if begin > 1 else max(1, min(_BEGINNING, item.length // 2))]


def choose_prompts(
    source: Source, items: Sequence[Demonstration], count: int, response_length: int
) -> list[np.ndarray]:
    """The first `count` prompts that leave room for a completion in the model's context."""
    prompts = (prompt_tokens(item) for item in items)
    room = source.config.context_length - response_length
    return [prompt for prompt in prompts if len(prompt) <= room][:count]


def complete(
    source: Source, policy: Params, prompts: Sequence[np.ndarray], response_length: int, seed: int
) -> list[str]:
    """One completion a prompt, drawn at temperature 1.

    Args:
        source: the model's shape and tokenizer.
        policy: its parameters.
        prompts: token ids int32 [P], of any lengths, from `choose_prompts`.
        response_length: most tokens of a completion.
        seed: of the draws: two policies that are equal give equal completions.

    Returns:
        The texts behind the prompts; none where there are no prompts.
    """
    if not prompts:
        return []
    ends = folder_stop_tokens(source.tokenizer, source.folder)
    sampling = SamplingConfig(max_new_tokens=response_length, stop_tokens=ends, pad_token=source.pad)
    rollout = _generate(source.config, policy, left_pad(prompts, source.pad), jax.random.key(seed), sampling)
    return render(source.tokenizer, rollout.tokens, rollout.mask)


def write_completions(
    path: Path, source: Source, prompts: Sequence[np.ndarray], completions: Mapping[str, Sequence[str]]
) -> Path:
    """Writes the completions of each prompt under one another, see `write_samples`.

    Args:
        path: the file.
        source: has the tokenizer of the prompts.
        prompts: token ids int32 [P], of any lengths.
        completions: by heading, one text a prompt.

    Returns:
        The path.
    """
    samples = [
        {"prompt": source.tokenizer.decode(prompt)} | {name: texts[number] for name, texts in completions.items()}
        for number, prompt in enumerate(prompts)
    ]
    return write_samples(path, "Completions of held-out prompts", samples)


def readable(content: str | list[dict]) -> str:
    """A text as it is, a chat as one line a message.

    Example:
        >>> print(readable([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]))
        user: 1+1?
        assistant: 2
    """
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {message['content']}" for message in content)


def write_samples(path: Path, title: str, samples: Sequence[Mapping[str, str]]) -> Path:
    """Writes texts side by side as Markdown, each as it is; the first of several processes does.

    Args:
        path: the file; its folder is made.
        title: what the samples are.
        samples: for each sample, its texts by their headings.

    Returns:
        The path.
    """
    lines = [f"# {title}", ""]
    for number, sample in enumerate(samples, start=1):
        lines += [f"## {number}", ""]
        for heading, text in sample.items():
            # A text may hold ``` itself: the fence is longer than any run of them.
            fence = "```" if "```" not in text else "`" * 12
            lines += [f"**{heading}**", "", fence, text, fence, ""]
    if first_process():
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8")
    return path
