"""The script that a file of tests is named after, and what it runs on: a tiny random Llama with a tokenizer of bytes,
files of rows, processes of its own, and users who press Ctrl-C.
"""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.models.huggingface import load_policy, load_tokenizer, save_reward_model
from rlhf_jax.training.export import padding_of_its_own

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = "the cat dog sat ran off and mat sad red".split()


@pytest.fixture(scope="module")
def script(request):
    """The module of `experiments/NAME.py`, in the tests of `test_NAME.py`."""
    name = Path(request.path).stem.removeprefix("test_")
    specification = importlib.util.spec_from_file_location(
        f"{name}_experiment", REPOSITORY / "experiments" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def start():
    """`start(name, arguments, devices, log)` begins a script in a process of its own, compiled as the tests are."""

    def start(name, arguments, devices, log):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(REPOSITORY),
        }
        command = [sys.executable, REPOSITORY / "experiments" / f"{name}.py", *map(str, arguments)]
        with open(log, "a") as file:
            return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    return start


@pytest.fixture
def interrupt(script, monkeypatch):
    """`interrupt(config, where, number)` runs the script; Ctrl-C is pressed while `where.batches` hands out a batch."""

    def interrupt(config, where, number):
        batches = where.batches

        def stopped(*arguments, **options):
            stream = batches(*arguments, **options)

            class Stream:
                get_state, set_state, taken = stream.get_state, stream.set_state, 0

                def __next__(self):
                    self.taken += 1
                    if self.taken == number:
                        os.kill(os.getpid(), signal.SIGINT)
                    return next(stream)

            return Stream()

        with monkeypatch.context() as patch:
            patch.setattr(where, "batches", stopped)
            with pytest.raises(KeyboardInterrupt):
                script.main(config)

    return interrupt


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of a Llama of width 16 with a context of 64 bytes; it has an EOS token and no pad token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: id for id, token in enumerate(["</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _sentence(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(words))


def write_rows(path, rows):
    """A JSONL file of rows; returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory):
    """40 rows of `prompt` and `completion`: 16 or 20 tokens each."""
    generator = random.Random(0)
    rows = [
        {"prompt": f"{number}. {_sentence(generator, 2)}", "completion": f" {_sentence(generator, 1 + number % 2)}"}
        for number in range(10, 50)
    ]
    return write_rows(tmp_path_factory.mktemp("rows") / "demonstrations.jsonl", rows)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """40 rows of `prompt`, `chosen` and `rejected`: 20 tokens each; joy is preferred to woe."""
    generator = random.Random(1)
    rows = [
        {
            "prompt": f"{number}. {_sentence(generator, 2)}",
            "chosen": f" joy {_sentence(generator, 1)}",
            "rejected": f" woe {_sentence(generator, 1)}",
        }
        for number in range(10, 50)
    ]
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def rewards(tiny_model, tmp_path_factory):
    """Folders of two reward models."""
    config, policy = load_policy(tiny_model)
    tokenizer, config, trunk = padding_of_its_own(load_tokenizer(tiny_model), config, policy["trunk"])
    folders = [tmp_path_factory.mktemp("reward") / "model" for _ in range(2)]
    for seed, folder in enumerate(folders):
        save_reward_model(
            folder, config, {"trunk": trunk, "head": init_reward_head(config, jax.random.key(seed))}, tokenizer
        )
    return tuple(map(str, folders))
