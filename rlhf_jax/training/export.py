"""What a training script leaves for others: a Hugging Face folder, and the adapter apart in PEFT's format.

All processes of a run call these functions: the model is put together on the first, array by array, which writes it.
"""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from rlhf_jax.models.adapters import AdapterConfig, merge
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.huggingface import save_policy, save_reward_model
from rlhf_jax.models.peft_folders import save_adapter
from rlhf_jax.parallel.distributed import process_count
from rlhf_jax.parallel.meetings import gathered, on_first
from rlhf_jax.training.sources import Source
from rlhf_jax.types import Params

PEFT_KINDS = ("lora", "dora", "ia3")


def export_policy(
    out: Path, source: Source, trained: Params, base: Params | None = None, adapter: AdapterConfig | None = None
) -> None:
    """Writes `OUT/model`, which `transformers` loads; of an adapter the merged model, and `OUT/adapter` for PEFT.

    A line says so where PEFT has no name for what the adapter changes.

    Args:
        out: folder of the run.
        source: the model that training began with.
        trained: the policy, or its adapter.
        base: the policy under the adapter.
        adapter: what the adapter was made with; None: there is none.
    """
    model = _on_first(trained if adapter is None else merge(base, trained, adapter))
    apart = _on_first(trained) if adapter is not None and adapter.kind in PEFT_KINDS else None

    def write() -> None:
        save_policy(out / "model", source.config, model, source.tokenizer, source=source.folder)
        if apart is not None:
            try:
                save_adapter(out / "adapter", apart, adapter, source.options["model_type"], str(source.folder))
            except ValueError as error:  # a family or a projection that PEFT adapts otherwise
                print(f"the adapter is in {out / 'model'} only, merged: {error}", flush=True)

    on_first(write, "writing the trained model")


def export_reward_model(
    out: Path, source: Source, trained: Params, base: Params | None = None, adapter: AdapterConfig | None = None
) -> None:
    """Writes `OUT/model`, a `…ForSequenceClassification` with one label; of an adapter the merged model.

    The classes of `transformers` score the last token that is not padding, and these models learned to score a
    sequence at its EOS token: so the folder's pad token must be another one, see `padding_of_its_own`.

    Args:
        out: folder of the run.
        source: the model that training began with.
        trained: `{"trunk", "head"}`; with an adapter, the trunk is the adapter.
        base: `{"trunk"}` under the adapter.
        adapter: what the adapter was made with; None: there is none.
    """
    if adapter is not None:
        trained = merge(base, trained["trunk"], adapter) | {"head": trained["head"]}
    tokenizer, config, trunk = padding_of_its_own(source.tokenizer, source.config, trained["trunk"])
    model = _on_first(trained | {"trunk": trunk})

    def write() -> None:
        save_reward_model(out / "model", config, model, tokenizer, source=source.folder)

    on_first(write, "writing the trained model")


def padding_of_its_own(tokenizer: Any, config: ModelConfig, trunk: Params) -> tuple[Any, ModelConfig, Params]:
    """A tokenizer whose pad token is not its EOS token, and a trunk that knows it.

    The pad token stays if it is another than EOS; else the token for unknown text serves; else a new token `<pad>` is
    added, for which the embedding gets a row of zeros where its padding has no row left. A line says what was done.

    Args:
        tokenizer: a `transformers` tokenizer; it is left as it is.
        config: shape of the trunk.
        trunk: its parameters.

    Returns:
        The tokenizer, the shape and the parameters, changed as far as needed.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return tokenizer, config, trunk
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.unk_token_id not in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    print(f"the exported reward model pads with {tokenizer.pad_token}, for a pad token must not be the EOS token")
    missing = tokenizer.pad_token_id + 1 - config.vocab_size
    if missing > 0:
        config = dataclasses.replace(config, vocab_size=config.vocab_size + missing)
        embedding = jnp.pad(trunk["embed"]["embedding"], ((0, missing), (0, 0)))
        trunk = trunk | {"embed": {"embedding": embedding}}
    return tokenizer, config, trunk


def _on_first(tree: Params) -> Params:
    """Parameters that the first process can write; a run of one process can write what it has."""
    return tree if process_count() == 1 else gathered(tree, everywhere=False)
