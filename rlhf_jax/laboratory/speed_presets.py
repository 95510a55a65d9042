"""What is run to measure speed, here and by a peer: shapes of models and sizes of batches."""

import dataclasses
from typing import Literal

from rlhf_jax.laboratory.work import Sizes
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.parallel.plan.published import PUBLISHED

SpeedPreset = Literal["cpu", "gpu", "tiny"]
CPU_MODEL = ModelConfig(
    vocab_size=4096,
    width=256,
    layers=4,
    heads=8,
    key_value_heads=4,
    feed_forward_width=704,
    context_length=512,
    tied_embeddings=False,
)
MODELS = {
    "cpu": CPU_MODEL,
    "gpu": PUBLISHED["llama-3.2-1b"],
    "tiny": dataclasses.replace(
        CPU_MODEL, vocab_size=32, width=16, layers=1, heads=2, key_value_heads=1, feed_forward_width=24
    ),
}
SIZES = {
    "cpu": Sizes(),
    "gpu": Sizes(
        prompt_length=512,
        response_length=512,
        generated=(8, 64, 256),
        prompts=4,
        samples=8,
        sequence_length=2048,
        demonstrations=8,
        pairs=4,
        scored=16,
        weights="bfloat16",
    ),
    "tiny": Sizes(
        prompt_length=4,
        response_length=4,
        generated=(2,),
        prompts=2,
        samples=2,
        sequence_length=8,
        demonstrations=2,
        pairs=2,
        scored=2,
    ),
}
