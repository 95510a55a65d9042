"""Two small trained models against a float32 numpy forward: logits, greedy text, and the likelihood of real stories."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.heads import unembed
from rlhf_jax.models.huggingface import load_policy, load_tokenizer
from rlhf_jax.models.transformer import apply_trunk
from rlhf_jax.sampling.filters import SamplingConfig
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import Prompts

NAMES = ("stories260K", "babyllama_tok105")
BEGIN, END, SPACE = 1, 2, "▁"


class Reference:
    """A trained model with its golden values and its tokenizer as two functions."""

    def __init__(self, folder, name: str):
        self.config, self.params = load_policy(folder / f"{name}_hf")
        self.golden = json.loads((folder / name / "reference.json").read_text(encoding="utf-8"))
        self.logits = np.load(folder / name / "reference_logits.npz")
        if name == "stories260K":
            tokenizer = load_tokenizer(folder / f"{name}_hf")
            self.encode = lambda text: [BEGIN, *tokenizer.encode(text, add_special_tokens=False)]
            self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        else:
            lines = (folder / name / "tok105.vocab").read_text(encoding="utf-8").split("\n")
            pieces = [line.split("\t")[0] for line in lines if line]
            ids = {piece: number for number, piece in enumerate(pieces)}
            # Newlines have no piece: the model was trained with the unknown token (0) in their place.
            self.encode = lambda text: [BEGIN, *(ids.get(c, 0) for c in (SPACE + text.replace(" ", SPACE)))]
            shown = {0: "\n", BEGIN: "", END: ""}
            self.decode = lambda ids: "".join(shown.get(i, pieces[i]) for i in ids).replace(SPACE, " ").lstrip(" ")


@pytest.fixture(scope="module", params=NAMES)
def reference(request, shared_data) -> Reference:
    return Reference(shared_data / "weights", request.param)


@pytest.fixture(scope="module")
def stories(shared_data) -> list[str]:
    lines = (shared_data / "corpus" / "tinystories.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines[:8]]


def left_padded(rows: list[list[int]]) -> Prompts:
    longest = max(map(len, rows))
    tokens = np.zeros((len(rows), longest), np.int32)
    mask = np.zeros((len(rows), longest), bool)
    for row, ids in enumerate(rows):
        tokens[row, longest - len(ids) :] = ids
        mask[row, longest - len(ids) :] = True
    return Prompts(tokens=jnp.asarray(tokens), mask=jnp.asarray(mask), index=jnp.arange(len(rows)))


def logits_of(reference: Reference, tokens, mask):
    def forward(params, tokens, mask):
        return unembed(reference.config, params, apply_trunk(reference.config, params["trunk"], tokens, mask).final)

    return np.asarray(jax.jit(forward)(reference.params, tokens, mask))


def test_logits_equal_those_of_numpy(reference, record_property):
    expected = [reference.logits[f"logits_{row}"] for row in range(3)]
    prompts = left_padded([reference.logits[f"ids_{row}"].tolist() for row in range(3)])
    found = logits_of(reference, prompts.tokens, prompts.mask)
    difference = max(float(np.abs(found[row, -len(e) :] - e).max()) for row, e in enumerate(expected))
    record_property("largest_difference_of_logits", difference)
    print(f"{reference.golden['model']}: largest difference of logits {difference:.2e}")
    assert difference < 1e-4


def test_greedy_decoding_writes_the_same_text(reference):
    generations = reference.golden["generations"]
    prompts = left_padded([generation["prompt_ids"] for generation in generations])
    assert [reference.encode(generation["prompt"]) for generation in generations] == [
        generation["prompt_ids"] for generation in generations
    ]
    sampling = SamplingConfig(max_new_tokens=96, stop_tokens=(BEGIN, END), temperature=0.0)
    rollout = jax.jit(generate, static_argnums=(0, 4))(
        reference.config, reference.params, prompts, jax.random.key(0), sampling
    )
    for row, generation in enumerate(generations):
        new = np.asarray(rollout.tokens[row])[np.asarray(rollout.mask[row])].tolist()
        assert new == generation["greedy_new_ids"]
        assert reference.decode(generation["prompt_ids"] + new) == generation["greedy_text"]


def test_the_likelihood_of_real_stories_is_that_of_numpy(reference, stories, record_property):
    """Mean over all tokens but the first, of the story behind a beginning-of-text token, cut to the context."""
    ids = [reference.encode(story)[: reference.config.context_length] for story in stories]
    tokens = jnp.asarray([row + [0] * (reference.config.context_length - len(row)) for row in ids], jnp.int32)
    mask = jnp.arange(reference.config.context_length)[None] < jnp.asarray([len(row) for row in ids])[:, None]
    logprobs = np.asarray(jax.nn.log_softmax(logits_of(reference, tokens, mask), axis=-1))
    differences = []
    for row, golden in enumerate(reference.golden["text_nll"]):
        assert hashlib.sha1(np.asarray(ids[row], np.int32).tobytes()).hexdigest() == golden["ids_sha1"]
        taken = logprobs[row, np.arange(len(ids[row]) - 1), ids[row][1:]]
        differences.append(abs(float(-taken.mean()) - golden["mean_nll"]))
    record_property("largest_difference_of_nll", max(differences))
    print(f"{reference.golden['model']}: largest difference of mean negative log-likelihood {max(differences):.2e}")
    assert max(differences) < 1e-5
