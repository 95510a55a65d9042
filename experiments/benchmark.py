"""How fast each algorithm runs here, beside what the machine can do: tokens a second, MFU, memory, compilation.

    python experiments/benchmark.py
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python experiments/benchmark.py  # Linux: large arrays on large pages
    JAX_COMPILATION_CACHE_DIR= python experiments/benchmark.py  # compiles anew, where the default reads its cache
    python experiments/benchmark.py --preset gpu --rows generate SFT GRPO PPO --trace

Weights are random and responses all as long as they may be. A row is timed over at least `--steps` steps after those
that compile it and warm it up; numbers are medians with bootstrap intervals. Ceilings are measured in the same process:
FLOP/s of the fastest matrix product, bytes a second of a copy. MFU counts what a step needs, not what a backward pass
computes again. Decoding is what "generate" takes beyond its first token; it has to read all weights once a step, and
the filled part of the cache.

Three rows compare two programs, which take turns: "queue" (responses of unequal lengths, a few slots refilled from a
queue, beside plain batches), "buckets" (an update on such responses, cut to the next of a few lengths, beside whole
ones) and "study" (seeds of the over-optimisation study in one program, beside run after run; on a CPU ask for it alone,
it has every core as a device then, see `experiments/lanes.py`). "gap" is the difference between the sampler's log-
probabilities and those of training.

The CPU preset is compared with figures that a PyTorch peer reached on two cores in float32. The GPU preset has the
shape of Llama 3.2 1B; a row that does not fit into memory says so, and the others go on. JAX takes three quarters of a
GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION=.95 stands in front.
"""

import dataclasses
import time
from typing import Any, Literal, get_args

import jax
import numpy as np

from rlhf_jax.evaluation.ceilings import Ceiling, copy_ceiling, matmul_ceiling, model_products
from rlhf_jax.evaluation.statistics import row
from rlhf_jax.laboratory.options import Options
from rlhf_jax.laboratory.rollout_costs import measure_buckets, measure_gap, measure_queue
from rlhf_jax.laboratory.speed_figure import speed_figure
from rlhf_jax.laboratory.speed_presets import MODELS, SIZES, SpeedPreset
from rlhf_jax.laboratory.step_costs import GIB, Found, fitting, measure, median_row, process_peak, summary_of
from rlhf_jax.laboratory.study_costs import measure_study
from rlhf_jax.laboratory.work import Sizes
from rlhf_jax.laboratory.workloads import generation, workloads
from rlhf_jax.models.config import Attention, ModelConfig, Remat
from rlhf_jax.parallel.lanes import use_all_cores
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.compilation import CompileClock
from rlhf_jax.training.metrics import MetricsWriter
from rlhf_jax.training.options import RunOptions

PEERS = {"generate": 5300.0, "SFT": 4100.0, "DPO": 3500.0, "GRPO": 3000.0, "PPO": 1750.0}
"""Tokens a second of the peer on the workload of the preset "cpu"."""
GOALS = {"generate": 2.0, "SFT": 2.0, "DPO": 2.0, "GRPO": 2.0, "PPO": 3.0}
"""How many times as fast this should be."""
Row = Literal[
    "generate",
    "SFT",
    "reward model",
    "DPO",
    "GRPO",
    "GRPO rollout",
    "GRPO update",
    "PPO",
    "PPO rollout",
    "PPO update",
    "rollout score",
    "score",
    "last-layer statistics",
    "queue",
    "buckets",
    "gap",
    "study",
]


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """Options of the measurement.

    Attributes:
        preset: a complete configuration to start from; other options given change it.
        out: folder to write to; None: runs/benchmark/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a check fails.
        rows: what to measure, in this order.
        steps: timed steps of a row, at least 2.
        trace: profile three steps of every row into the folder's `trace`, for Perfetto and TensorBoard.
        sizes: of the batches.
        dtype: dtype of the computation; "generate" keeps its parameters in it too.
        attention: how attention is computed, see `ModelConfig.attention`.
        remat: what a layer keeps for the backward pass, see `ModelConfig.remat`.
        copied: bytes of the array whose copy is timed.
        largest_product: side of the largest square matrices whose product is timed.
        queued: responses of "queue".
        slots: of them drawn at a time.
        mean_length: mean length of the responses of "queue" and "buckets", in tokens.
        longest: their longest.
        buckets: lengths that the update of "buckets" can be cut to.
        seeds: runs of "study".
        updates: updates of each run in a timed call.
    """

    preset: SpeedPreset = "cpu"
    rows: tuple[Row, ...] = get_args(Row)
    steps: int = 10
    trace: bool = False
    sizes: Sizes = dataclasses.field(default_factory=Sizes)
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Attention = "auto"
    remat: Remat = "none"
    copied: int = 2**28
    largest_product: int = 2048
    queued: int = 256
    slots: int = 32
    mean_length: int = 16
    longest: int = 128
    buckets: int = 4
    seeds: int = 16
    updates: int = 2


PRESETS = {
    "cpu": Config(),
    "gpu": Config(
        "gpu",
        sizes=SIZES["gpu"],
        dtype="bfloat16",
        remat="full",
        copied=2**32,
        largest_product=8192,
        queued=512,
        slots=64,
        mean_length=64,
        longest=512,
        seeds=256,
        updates=10,
    ),
    "tiny": Config(
        "tiny",
        steps=2,
        sizes=SIZES["tiny"],
        copied=2**16,
        largest_product=64,
        queued=4,
        slots=2,
        mean_length=2,
        longest=6,
        seeds=2,
        updates=1,
    ),
}


def model_of(config: Config) -> ModelConfig:
    """The shape that a preset has."""
    return dataclasses.replace(
        MODELS[config.preset], dtype=config.dtype, attention=config.attention, remat=config.remat
    )


def ceilings(config: Config, model: ModelConfig) -> dict[str, Ceiling]:
    """The two ceilings of this machine, "matmul" in FLOP/s and "copy" in bytes/s."""
    squares = [(side, side, side) for side in (config.largest_product // 2, config.largest_product)]
    tokens = config.sizes.demonstrations * config.sizes.sequence_length
    products = (*squares, *model_products(tokens, model.width, model.feed_forward_width, model.vocab_size))
    return {"matmul": matmul_ceiling(config.dtype, products), "copy": copy_ceiling(config.copied)}


def measure_steps(
    config: Config, row_name: str, found: dict[str, Ceiling], clock: CompileClock, folder: run_folder.RunFolder
) -> Found:
    """Rows and checks of a row of steps (of "generate", of every batch); one that does not fit into memory has none."""
    rows, checks, model = [], [], model_of(config)
    known = workloads(model, config.sizes)
    for name in [name for name in known if name.split(",")[0] == row_name]:
        trace = folder.path / "trace" / name.replace(", ", "_").replace(" ", "_") if config.trace else None
        with fitting(name, checks):
            workload = known[name]()
            cost = measure(workload, config.steps, clock, trace)
            more, held = summary_of(name, workload, cost, found["matmul"].rate)
            rows += more
            checks += held
            if row_name == "generate" and config.sizes.response_length > 1:
                one_token = dataclasses.replace(config.sizes, response_length=1)
                prompts = workload.tokens // config.sizes.response_length
                prefill = measure(generation(model, one_token, prompts), config.steps, clock).seconds
                share = workload.read / (cost.seconds - np.median(prefill)) / found["copy"].rate
                rows.append(median_row(f"{name}: bytes read in decoding", "of the copy ceiling", share))
    return rows, checks


def measure_row(
    config: Config, name: str, found: dict[str, Ceiling], clock: CompileClock, folder: run_folder.RunFolder
) -> Found:
    """Rows and checks of one entry of `Config.rows`."""
    model = dataclasses.replace(model_of(config), param_dtype=config.dtype)
    if name == "queue":
        lengths = (config.slots, config.mean_length, config.longest)
        return measure_queue(model, config.queued, config.sizes.prompt_length, *lengths, config.steps)
    if name == "buckets":
        return measure_buckets(
            model_of(config), config.sizes, config.buckets, config.mean_length, config.longest, config.steps
        )
    if name == "gap":
        return measure_gap(model, config.sizes)
    if name == "study":
        tiny = dict(pairs=32, rollouts=8, policy_layers=1, width=8) if config.preset == "tiny" else {}
        lanes = dict(seeds=config.seeds, updates=config.updates, report_every=config.updates, methods=("PPO",))
        return measure_study(Options(**lanes | tiny), config.steps)
    return measure_steps(config, name, found, clock, folder)


def check_options(config: Config) -> None:
    """Refuses options that cannot be.

    Raises:
        ValueError: naming the option.
    """
    ones = ("queued", "slots", "mean_length", "longest", "buckets", "updates")
    least = dict(steps=2, copied=4, largest_product=2, seeds=2) | dict.fromkeys(ones, 1)
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}: give {smallest} or more.")
    if not config.rows:
        raise ValueError(f"--rows is empty: choose of {', '.join(get_args(Row))}.")
    for name, value in vars(config.sizes).items():
        if isinstance(value, int | tuple) and (not value or np.min(value) < 1):
            raise ValueError(f"--sizes.{name.replace('_', '-')} is {value}: give 1 or more.")
    if config.queued % config.slots:
        raise ValueError(f"--queued {config.queued} does not split into batches of --slots {config.slots}.")


def main(config: Config) -> dict:
    """Measures what is asked for and returns the summary."""
    began, clock = time.monotonic(), CompileClock()
    check_options(config)
    if config.rows == ("study",):
        use_all_cores()
    folder = run_folder.create(config.out, "benchmark", config, config.overwrite)
    found = ceilings(config, model_of(config))
    rows = [
        row(f"ceiling: matrix products ({found['matmul'].of})", "GFLOP/s", np.array([found["matmul"].rate / 1e9])),
        row(f"ceiling: a copy ({found['copy'].of})", "GB/s", np.array([found["copy"].rate / 1e9])),
    ]
    checks: list[dict[str, Any]] = []
    with MetricsWriter(folder.path / "metrics.jsonl") as metrics:
        for number, name in enumerate(config.rows):
            print(f"{name} ({number + 1} of {len(config.rows)})", flush=True)
            more, held = [], []
            with fitting(name, held):
                more, held = measure_row(config, name, found, clock, folder)
            values = {one["name"]: one["mean"] for one in more} | {one["name"]: one["value"] for one in held}
            metrics.write(number, {"row": name} | values)
            rows, checks = rows + more, checks + held
    if jax.default_backend() == "cpu":
        rows.append(row("most memory of the process", "GiB", np.array([process_peak() / GIB])))
    speeds = {one["name"].removesuffix(": tokens"): one["mean"] for one in rows if one["name"].endswith(": tokens")}
    same = (config.preset, config.sizes, config.dtype) == ("cpu", SIZES["cpu"], "float32")
    peers = PEERS if same else {}
    for name in filter(speeds.__contains__, peers):
        times = speeds[name] / peers[name]
        checks.append(run_folder.check(f"{name}: times as fast as the peer", times, GOALS[name], "at least"))
    used = {one["name"].removesuffix(": MFU"): one["mean"] for one in rows if one["name"].endswith(": MFU")}
    if used:
        speed_figure(speeds, peers, used, folder.path / "figures" / "benchmark.png")
    return run_folder.conclude(folder, rows, checks, began, clock.seconds)


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
