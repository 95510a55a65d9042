"""What the policies wrote, scored with the gold reward afterwards: curves and samples."""

from collections.abc import Callable
from typing import Any

import numpy as np

from rlhf_jax.data.world import World
from rlhf_jax.evaluation.statistics import pearson
from rlhf_jax.evaluation.study import Runs, Study
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.policies import lane_table


def curves_of(
    options: Options, world: World, scale: Callable[[np.ndarray], np.ndarray], history: dict[str, Any]
) -> tuple[Study, np.ndarray]:
    """The runs of a study by rule and KL coefficient, and the gold of every stored response.

    Args:
        options: of the study.
        world: whose gold reward is asked.
        scale: standardises it.
        history: from `policies.train_policies`.

    Returns:
        The study, and gold float64 [lanes, updates, B].
    """
    prompts = np.asarray(world.prompts.tokens)[history["rows"]]
    flat = [array.reshape(-1, array.shape[-1]) for array in (prompts, history["tokens"], history["mask"])]
    gold = scale(world.gold(*flat)).reshape(history["rows"].shape)
    gap = np.abs(history["proxy"] - gold)
    length = history["mask"].sum(axis=-1)
    study = {}
    for place, lane in enumerate(lane_table(options)[:: options.seeds]):
        mine = slice(place * options.seeds, (place + 1) * options.seeds)

        def mean(array: np.ndarray, mine: slice = mine) -> np.ndarray:
            return np.asarray(array[mine], np.float64).mean(axis=-1)

        pairs = zip(history["uncertainty"][mine].astype(np.float64), gap[mine], strict=True)
        study[lane["method"], lane["kl_coefficient"]] = Runs(
            kl=np.asarray(history["metrics"]["objective/kl"][mine], np.float64),
            gold=mean(gold),
            proxy=mean(history["proxy"]),
            uncertainty=mean(history["uncertainty"]),
            spread=mean(history["spread"]),
            gap=mean(gap),
            length=mean(length),
            sample_correlation=np.array([pearson(u.reshape(-1), error.reshape(-1)) for u, error in pairs]),
        )
    return study, gold


def samples(options: Options, world: World, history: dict[str, Any], gold: np.ndarray, count: int = 8) -> str:
    """Markdown tables of what plain PPO wrote at first, its best texts, and its hackiest ones at the end.

    The last two tables take equally many texts of every seed: each seed's reward model has a hack of its own.

    Args:
        options: of the study, whose first lanes are plain PPO at the first KL coefficient.
        world: which reads tokens as text.
        history: from `policies.train_policies`.
        gold: from `curves_of`.
        count: texts a table.
    """
    mine = slice(0, options.seeds)
    last = options.updates - max(1, options.updates // 10)

    def table(title: str, chosen: list[tuple[int, ...]]) -> str:
        place = tuple(np.array(chosen).T)
        rows = history["rows"][place]
        prompts = (np.asarray(world.prompts.tokens)[rows], np.asarray(world.prompts.mask)[rows])
        texts = world.read(*prompts, history["tokens"][place], history["mask"][place])
        lines = [f"## {title}", "", "| gold | proxy | prompt | response |", "|---:|---:|---|---|"]
        for where, text in zip(chosen, texts, strict=True):
            prompt, response = (" ".join(part.split()).replace("|", "/") for part in text)
            lines.append(f"| {gold[where]:+.2f} | {history['proxy'][where]:+.2f} | {prompt} | {response} |")
        return "\n".join(lines)

    def top(value: np.ndarray, first_update: int) -> list[tuple[int, ...]]:
        """Where `value` [seeds, updates, B] is largest from an update on: as many of every seed, no text twice."""
        seen, chosen = set(), []
        for seed in range(options.seeds):
            wanted = len(chosen) + -(-count // options.seeds)
            for flat in np.argsort(-value[seed, first_update:].reshape(-1), kind="stable"):
                update, response = np.unravel_index(flat, value[seed, first_update:].shape)
                place = (seed, int(update) + first_update, int(response))
                text = history["tokens"][place].tobytes()
                if text not in seen:
                    seen.add(text)
                    chosen.append(place)
                if len(chosen) == wanted:
                    break
        return sorted(chosen, key=lambda place: -value[place])[:count]

    return "\n\n".join(
        [
            "# Samples of plain PPO (gold and proxy in standard deviations of the initial policy's)",
            table("Before training", [(0, 0, response) for response in range(min(count, options.rollouts))]),
            table("Best by gold, at any time", top(gold[mine], 0)),
            table("Hackiest at the end: largest proxy minus gold", top((history["proxy"] - gold)[mine], last)),
        ]
    )
