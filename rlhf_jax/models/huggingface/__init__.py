"""Hugging Face model folders in and out, for every family of the table in `families`.

A folder's way in: `folders` finds it, `config_json` turns its `config.json` into a `ModelConfig` through the family's
list of `options`, `tensors` locates its tensors, and `load` puts each where it belongs. The way out goes back through
the same tables: `shards` names and orients the tensors, `save` adds the rest, `replace` makes it one step.

    config, params = load_policy("path/to/Qwen3-0.6B", dtype="bfloat16")  # or load_reward_model …
    save_policy("OUT", config, params, load_tokenizer("path/to/Qwen3-0.6B"), source="path/to/Qwen3-0.6B")

`load_config` reads the shape alone, `from_hf_config` and `to_hf_config` translate it without a folder, and `family_of`
names the family that a shape can be saved as. The table itself is `FAMILIES`: a new family is one more entry.
"""

from rlhf_jax.models.huggingface.config_json import family_of, from_hf_config, to_hf_config
from rlhf_jax.models.huggingface.families import FAMILIES
from rlhf_jax.models.huggingface.folders import check_tokenizer, load_tokenizer
from rlhf_jax.models.huggingface.load import Placement, load_config, load_policy, load_reward_model, load_value_model
from rlhf_jax.models.huggingface.save import save_policy, save_reward_model, save_value_model

__all__ = [
    "FAMILIES",
    "Placement",
    "check_tokenizer",
    "family_of",
    "from_hf_config",
    "load_config",
    "load_policy",
    "load_reward_model",
    "load_tokenizer",
    "load_value_model",
    "save_policy",
    "save_reward_model",
    "save_value_model",
    "to_hf_config",
]
