"""What a reward model knows, computed on eight devices, is what one device computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.adapters import AdapterConfig, init_adapter
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.heads import init_reward_model
from rlhf_jax.parallel.mesh import make_mesh, parse_mesh
from rlhf_jax.parallel.sharding import infer, place_batch
from rlhf_jax.rewards.bradley_terry import EnsembleParams, ensemble_scorer
from rlhf_jax.rewards.dropout import DropoutParams, draw_masks, dropout_scorer
from rlhf_jax.rewards.ellipsoid import geometry, gram
from rlhf_jax.rewards.last_layer import displacement
from rlhf_jax.rewards.linear_ensemble import LinearEnsembleParams, init_heads, linear_ensemble_scorer
from rlhf_jax.rewards.lora_ensemble import LoRAEnsembleParams, lora_ensemble_scorer
from rlhf_jax.rewards.posterior import PosteriorParams, fisher_geometry, pair_geometry, posterior_scorer
from rlhf_jax.types import Sequences

CONFIG = ModelConfig(
    vocab_size=16,
    width=8,
    layers=2,
    heads=2,
    key_value_heads=2,
    feed_forward_width=16,
    context_length=16,
    initializer_range=0.5,
)
LORA = AdapterConfig(kind="lora", targets=("query", "down"), rank=2, alpha=4.0)
MEMBERS, ROWS = 3, 32


def build(key) -> dict:
    """Parameters of each kind, the adapters moved from their start."""
    model_key, heads_key, adapter_key, masks_key = jax.random.split(key, 4)
    members = jax.vmap(lambda key: init_reward_model(CONFIG, key))(jax.random.split(model_key, MEMBERS))
    first = jax.tree.map(lambda leaf: leaf[0], members)
    base, offset = {"trunk": first["trunk"]}, jnp.array([0.5, -1.0, 0.25])
    heads = init_heads(CONFIG, heads_key, MEMBERS)
    adapters = jax.vmap(lambda key: init_adapter(LORA, base, key))(jax.random.split(adapter_key, MEMBERS))
    adapters = jax.tree.map(lambda leaf: leaf + 0.2 * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape)), adapters)
    seen = geometry(gram(jax.random.normal(jax.random.key(3), (20, CONFIG.width))), 1.0)
    radius, zero = jnp.float32(1.5), jnp.float32(0.0)
    masks = draw_masks(masks_key, MEMBERS, CONFIG.width, 0.25)
    return {
        "ensemble": EnsembleParams(members=members, offset=offset),
        "linear": LinearEnsembleParams(trunk=first["trunk"], heads=heads, offset=offset),
        "lora": LoRAEnsembleParams(base=base, adapters=adapters, heads=heads, offset=offset),
        "dropout": DropoutParams(trunk=first["trunk"], head=first["head"], masks=masks, offset=offset),
        "posterior": PosteriorParams(
            trunk=first["trunk"], head=first["head"], geometry=seen, radius=radius, offset=zero
        ),
    }


SCORERS = {
    "ensemble": ensemble_scorer(CONFIG, lead=1),
    "linear": linear_ensemble_scorer(CONFIG),
    "lora": lora_ensemble_scorer(CONFIG, LORA, lead=0),
    "dropout": dropout_scorer(CONFIG),
    "posterior": posterior_scorer(CONFIG),
}


@jax.jit
def everything(params: dict, batch: Sequences) -> dict:
    """Scores of each kind, and the sums over rows that uncertainties of the last layer come from."""
    found = {name: scorer(params[name], batch.tokens, batch.mask) for name, scorer in SCORERS.items()}
    features, others = found["linear"].features, found["ensemble"].features
    return found | {
        "gram": gram(features, chunk=8),
        "displacement": displacement(features, others),
        "pair geometry": pair_geometry(features, others, 1.0),
        "fisher geometry": fisher_geometry(features, others, params["posterior"].head, 1.0),
    }


@pytest.fixture(scope="module")
def given():
    lengths = jax.random.randint(jax.random.key(1), (ROWS, 1), 1, 9)
    tokens = jax.random.randint(jax.random.key(2), (ROWS, 8), 1, 16, jnp.int32)
    batch = Sequences(tokens=tokens, mask=jnp.arange(8)[None] < lengths)
    return jax.jit(build)(jax.random.key(0)), batch


@pytest.fixture(scope="module")
def expected(given):
    found = everything(*given)
    assert all(float(found[name].epistemic.min()) > 1e-3 for name in SCORERS)
    assert float(jnp.abs(found["displacement"]).max()) > 1e-2
    return found


@pytest.mark.parametrize("words", ["data=8", "data=2,fsdp=2,tensor=2"])
def test_eight_devices_give_the_scores_and_sums_of_one(given, expected, words):
    params, batch = given
    mesh = make_mesh(parse_mesh(words))
    params = jax.device_put(params, infer(params, mesh, (CONFIG,)))
    with jax.set_mesh(mesh):
        found = jax.block_until_ready(everything(params, place_batch(batch, mesh)))
    assert found["linear"].features.sharding.num_devices == 8

    def close(path, value, wanted):
        size = max(1.0, float(np.abs(wanted).max()))  # of sums over rows, in their own unit
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5 * size, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, found, expected)
