"""The peer of the benchmark: `generate` of transformers and a plain PyTorch training step, on the same workload.

    pip install torch transformers  # on a GPU in an environment of its own: JAX and PyTorch want their CUDA each
    JAX_PLATFORMS=cpu python experiments/against_transformers.py --preset gpu

The model has the shape and the batches those of `experiments/benchmark.py --preset gpu` (or cpu), with random weights:
`generate` with a static cache, which transformers compiles on a GPU, in the dtype of the computation; and an update of
supervised fine-tuning: scaled dot-product attention, autocast to that dtype, float32 parameters, fused AdamW.
Numbers are medians over `--steps` calls after two that warm up; memory is what PyTorch held at most on the GPU.
A row that does not fit into memory says so, and the others go on. `peer.json` says which versions and which GPU.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the memory is for PyTorch

import numpy as np

from rlhf_jax.evaluation.statistics import row
from rlhf_jax.laboratory.speed_presets import MODELS, SIZES, SpeedPreset
from rlhf_jax.laboratory.step_costs import GIB, WARM_UP, fitting, median_row
from rlhf_jax.laboratory.work import Sizes
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.huggingface import to_hf_config
from rlhf_jax.training import run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.json_files import write_json
from rlhf_jax.training.options import RunOptions


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """Options of the measurement.

    Attributes:
        preset: a complete configuration to start from; other options given change it.
        out: folder to write to; None: runs/against_transformers/<time>.
        overwrite: replace what an earlier run left in that folder.
        strict: exit with 1 when a check fails.
        rows: what to measure.
        steps: timed calls of a row, at least 2.
        sizes: of the batches.
        dtype: dtype of the computation.
        checkpointing: compute activations again in the backward pass.
        compiled: compile the training step too (torch.compile).
    """

    preset: SpeedPreset = "gpu"
    rows: tuple[Literal["generate", "SFT"], ...] = ("generate", "SFT")
    steps: int = 10
    sizes: Sizes = dataclasses.field(default_factory=lambda: SIZES["gpu"])
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    checkpointing: bool = False
    compiled: bool = False


PRESETS = {
    "gpu": Config(checkpointing=True),  # as `remat` there: activations and logits of the batch do not fit besides
    "cpu": Config("cpu", sizes=SIZES["cpu"], dtype="float32"),
    "tiny": Config("tiny", sizes=SIZES["tiny"], dtype="float32", steps=2),
}


def random_model(config: ModelConfig, dtype: str) -> Any:
    """A causal language model of transformers with this shape and random weights, on the GPU where there is one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = to_hf_config(config)
    shape = AutoConfig.for_model(options.pop("model_type"), **options)
    shape.eos_token_id = None  # nothing ends a response early
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        return AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype), attn_implementation="sdpa")


def random_tokens(model: Any, vocab_size: int, rows: int, length: int) -> Any:
    """Random tokens beside the model."""
    import torch

    return torch.randint(1, vocab_size, (rows, length), device=model.device)


def seconds_of(call: Callable[[], Any], steps: int) -> np.ndarray:
    """Seconds of each call, after those that warm up."""
    import torch

    finish = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = np.empty(steps)
    for step in range(-WARM_UP, steps):
        finish()
        began = time.perf_counter()
        call()
        finish()
        if step >= 0:
            seconds[step] = time.perf_counter() - began
    return seconds


def drawing(config: Config, shape: ModelConfig, rows: int) -> dict[str, np.ndarray]:
    """Tokens a second of `generate`, and milliseconds of a decoded token, the prompts' pass left out."""
    sizes, model = config.sizes, random_model(shape, config.dtype).eval()
    prompts = random_tokens(model, shape.vocab_size, rows, sizes.prompt_length)
    options = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None)

    def draw(new: int) -> Any:
        found = model.generate(
            prompts,
            attention_mask=prompts.new_ones(prompts.shape),
            max_new_tokens=new,
            cache_implementation="static",
            **options,
        )
        if found.shape[1] != sizes.prompt_length + new:
            raise RuntimeError(f"transformers drew {found.shape[1] - sizes.prompt_length} tokens in place of {new}")

    whole = seconds_of(lambda: draw(sizes.response_length), config.steps)
    found = {"tokens": rows * sizes.response_length / whole}
    if sizes.response_length > 1:
        first = np.median(seconds_of(lambda: draw(1), config.steps))
        found["a decoded token"] = 1e3 * (whole - first) / (sizes.response_length - 1)
    return found


def training(config: Config, shape: ModelConfig) -> dict[str, np.ndarray]:
    """Tokens a second of an update of supervised fine-tuning."""
    import torch

    sizes, model = config.sizes, random_model(shape, "float32").train()
    if config.checkpointing:
        model.gradient_checkpointing_enable()
    tokens = random_tokens(model, shape.vocab_size, sizes.demonstrations, sizes.sequence_length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=model.device.type == "cuda")
    forward = torch.compile(model) if config.compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()

    return {"tokens": sizes.demonstrations * sizes.sequence_length / seconds_of(step, config.steps)}


def check_options(config: Config) -> None:
    """Refuses options that cannot be.

    Raises:
        ValueError: naming the option, or what is not installed.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install {package}.")
    if config.steps < 2 or not config.rows:
        raise ValueError(f"--steps is {config.steps} and --rows {config.rows}: give 2 steps or more, and a row.")


def main(config: Config) -> dict:
    """Measures what is asked for and returns the summary."""
    began = time.monotonic()
    check_options(config)
    import torch

    folder = run_folder.create(config.out, "against_transformers", config, config.overwrite)
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    write_json(folder.path / "peer.json", versions | {"device": on})
    shape, found, checks = MODELS[config.preset], [], []
    several = len(config.sizes.generated) > 1
    measures: dict[str, Callable[[], dict[str, np.ndarray]]] = {}
    if "generate" in config.rows:
        for rows in config.sizes.generated:
            name = f"generate, batch {rows}" if several else "generate"
            measures[name] = lambda rows=rows: drawing(config, shape, rows)
    if "SFT" in config.rows:
        measures["SFT"] = lambda: training(config, shape)
    units = {"tokens": "a second", "a decoded token": "ms"}
    for name, measured in measures.items():
        print(name, flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with fitting(name, checks):
            found += [median_row(f"{name}: {what}", units[what], values) for what, values in measured().items()]
            if torch.cuda.is_available():
                peak = torch.cuda.max_memory_allocated() / GIB
                found.append(row(f"{name}: memory", "GiB", np.array([peak])))
    return run_folder.conclude(folder, found, checks, began, compile_seconds=0.0)


if __name__ == "__main__":
    run(main, PRESETS, __doc__)
