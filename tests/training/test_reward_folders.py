"""Folders of every kind of reward model: bitwise there and back, ordinary to `transformers`, and what is refused."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from rlhf_jax.models.adapters import AdapterConfig, init_adapter
from rlhf_jax.models.heads import init_policy, init_reward_model
from rlhf_jax.models.huggingface import load_reward_model, save_policy, save_reward_model
from rlhf_jax.models.huggingface.replace import replaced
from rlhf_jax.parallel.sharding import on
from rlhf_jax.rewards.bradley_terry import EnsembleParams, reward_scorer
from rlhf_jax.rewards.dropout import DropoutParams, draw_masks
from rlhf_jax.rewards.ellipsoid import Geometry
from rlhf_jax.rewards.gaussian import GaussianEnsembleParams, GaussianParams
from rlhf_jax.rewards.linear_ensemble import LinearEnsembleParams
from rlhf_jax.rewards.lora_ensemble import LoRAEnsembleParams
from rlhf_jax.rewards.posterior import PosteriorParams
from rlhf_jax.rewards.probabilistic import ProbabilisticParams
from rlhf_jax.rewards.quantile import QuantileParams
from rlhf_jax.training.reward_folders import (
    JSON_FILE,
    TENSOR_FILE,
    check_same_tokenizer,
    folder_identity,
    load_reward_folder,
    save_reward_folder,
)
from rlhf_jax.training.reward_kinds import KINDS, kind_of

WIDTH, MEMBERS, ATTRIBUTES = 8, 3, 2
ADAPTER = AdapterConfig(kind="lora", rank=2, alpha=3.0)
OPTIONS = {
    "ensemble": {"lead": 1},
    "lora_ensemble": {"adapter": ADAPTER},
    "gaussian": {"softmax": False},
    "gaussian_ensemble": {"lead": 2, "statistic": "range"},
}
# Kinds whose mean is one linear head on one trunk, which is then what `transformers` loads.
LINEAR = ("bradley_terry", "ensemble", "linear_ensemble", "dropout", "posterior", "quantile", "probabilistic")
TOKENS = jnp.array([[1, 5, 9, 2, 0, 0], [3, 4, 0, 0, 0, 0]], jnp.int32)
MASK = jnp.array([[True] * 4 + [False] * 2, [True] * 2 + [False] * 4])


def tokenizer(letters: str = "~abcdefghijklmn", template: str | None = "{{ messages[0].content }}\n"):
    vocabulary = {letter: place for place, letter in enumerate(letters)} | {"</s>": len(letters)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [])),
        eos_token="</s>",
        pad_token=letters[0],
        chat_template=template,
    )


def shapes_of(config) -> dict:
    """The parameters of every kind, as shapes."""

    def one(key) -> dict:
        model = init_reward_model(config, key)
        trunk, head = model["trunk"], model["head"]
        many = jnp.zeros(MEMBERS)
        layer = {"kernel": jnp.zeros((WIDTH, 2 * ATTRIBUTES)), "bias": jnp.zeros(2 * ATTRIBUTES)}
        gate = {
            "hidden": {"kernel": jnp.zeros((WIDTH, 3)), "bias": jnp.zeros(3)},
            "output": {"kernel": jnp.zeros((3, ATTRIBUTES)), "bias": jnp.zeros(ATTRIBUTES)},
        }
        ratings = jnp.zeros(ATTRIBUTES)
        gaussian = GaussianParams(trunk=trunk, attributes=layer, gate=gate, mean=ratings, scale=ratings)
        heads = {"kernel": jnp.zeros((MEMBERS, WIDTH)), "bias": many}
        adapters = jax.vmap(lambda key: init_adapter(ADAPTER, model, key))(jax.random.split(key, MEMBERS))

        def stack(tree):
            return jax.tree.map(lambda leaf: jnp.stack([leaf] * MEMBERS), tree)

        return {
            "bradley_terry": model,
            "ensemble": EnsembleParams(members=stack(model), offset=many),
            "linear_ensemble": LinearEnsembleParams(trunk=trunk, heads=heads, offset=many),
            "lora_ensemble": LoRAEnsembleParams(base={"trunk": trunk}, adapters=adapters, heads=heads, offset=many),
            "dropout": DropoutParams(trunk=trunk, head=head, masks=jnp.zeros((MEMBERS, WIDTH)), offset=many),
            "posterior": PosteriorParams(
                trunk=trunk,
                head=head,
                geometry=Geometry(cholesky=jnp.zeros((WIDTH, WIDTH))),
                radius=jnp.zeros(()),
                offset=jnp.zeros(()),
            ),
            "gaussian": gaussian,
            "gaussian_ensemble": GaussianEnsembleParams(members=stack(gaussian), offset=many),
            "quantile": QuantileParams(
                trunk=trunk, quantiles={"kernel": jnp.zeros((WIDTH, 4)), "bias": jnp.zeros(4)}, levels=jnp.zeros(4)
            ),
            "probabilistic": ProbabilisticParams(
                trunk=trunk, head={"kernel": jnp.zeros((WIDTH, 2)), "bias": jnp.zeros(2)}
            ),
        }

    return jax.eval_shape(one, jax.random.key(0))


def filled(shapes, seed: int = 0):
    """Parameters whose every number is random and matters."""
    generator = np.random.default_rng(seed)

    def fill(leaf):
        return jnp.asarray(generator.normal(size=leaf.shape, scale=0.5)).astype(leaf.dtype)

    return jax.tree.map(fill, shapes)


@pytest.fixture(scope="module")
def params(tiny_config) -> dict:
    found = filled(shapes_of(tiny_config))
    factor = jnp.tril(found["posterior"].geometry.cholesky) + 3.0 * jnp.eye(WIDTH)
    found["posterior"] = found["posterior"].replace(geometry=Geometry(cholesky=factor), radius=jnp.float32(2.0))
    found["dropout"] = found["dropout"].replace(masks=draw_masks(jax.random.key(0), MEMBERS, WIDTH, 0.5))
    found["quantile"] = found["quantile"].replace(levels=jnp.array([0.1, 0.3, 0.6, 0.9]))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_config, params) -> dict[str, Path]:
    """A folder of every kind."""
    out = tmp_path_factory.mktemp("folders")
    return {
        kind: save_reward_folder(out / kind, tiny_config, params[kind], tokenizer(), options=OPTIONS.get(kind))
        for kind in KINDS
    }


@functools.cache
def plain_scorer(config):
    return jax.jit(reward_scorer(config))


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def check(path, left, right):
        assert left.dtype == right.dtype, jax.tree_util.keystr(path)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes(), jax.tree_util.keystr(path)
        assert left.shape == right.shape, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_bitwise_with_its_scorer(kind, folders, params, tiny_config):
    found = load_reward_folder(folders[kind])
    assert (found.kind, found.config) == (kind, tiny_config)
    assert_same(found.params, params[kind])
    score = jax.jit(found.scorer)(found.params, TOKENS, MASK)
    expected = jax.jit(KINDS[kind].scorer(tiny_config, **OPTIONS.get(kind, {})))(params[kind], TOKENS, MASK)
    assert_same(score, expected)
    if kind in LINEAR:
        model = load_reward_model(folders[kind])[1]
        np.testing.assert_allclose(
            plain_scorer(tiny_config)(model, TOKENS, MASK).mean, score.mean, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["posterior", "gaussian_ensemble"])
def test_bfloat16_trunks_and_float32_heads_come_back_bitwise(kind, params, tiny_config, tmp_path):
    def narrow(path, leaf):
        return leaf.astype(jnp.bfloat16) if "trunk" in jax.tree_util.keystr(path) else leaf

    config = dataclasses.replace(tiny_config, param_dtype="bfloat16")
    saved = jax.tree_util.tree_map_with_path(narrow, params[kind])
    save_reward_folder(tmp_path / "out", config, saved, tokenizer())
    found = load_reward_folder(tmp_path / "out", param_dtype="bfloat16")
    assert_same(found.params, saved)
    wide = load_reward_folder(tmp_path / "out").params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide)} == {"float32"}


def test_an_ensembles_ordinary_model_is_its_lead(folders, params):
    _, model = load_reward_model(folders["ensemble"])
    lead = jax.tree.map(lambda leaf: leaf[1], params["ensemble"].members)
    assert_same(model["trunk"], lead["trunk"])
    assert_same(model["head"]["kernel"], lead["head"]["kernel"])
    np.testing.assert_allclose(model["head"]["bias"], lead["head"]["bias"] - params["ensemble"].offset[1], rtol=1e-6)
    _, model = load_reward_model(folders["gaussian_ensemble"])
    assert_same(model["trunk"], jax.tree.map(lambda leaf: leaf[2], params["gaussian_ensemble"].members.trunk))


def test_one_member_is_an_ensemble_too(params, tiny_config, tmp_path):
    one = jax.tree.map(lambda leaf: leaf[:1], params["ensemble"])
    save_reward_folder(tmp_path / "out", tiny_config, one, tokenizer())
    assert_same(load_reward_folder(tmp_path / "out").params, one)


def test_gated_attributes_are_averaged_in_the_units_of_the_ratings(folders, params):
    one = params["gaussian"]
    kernel, bias = np.asarray(one.attributes["kernel"]), np.asarray(one.attributes["bias"])
    mean, scale = np.asarray(one.mean), np.asarray(one.scale)
    _, model = load_reward_model(folders["gaussian"])
    np.testing.assert_allclose(
        model["head"]["kernel"], (scale[0] * kernel[:, 0] + scale[1] * kernel[:, 1]) / 2, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(model["head"]["bias"], (mean + scale * bias[:ATTRIBUTES]).mean(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["ensemble", "posterior"])
def test_transformers_loads_the_ordinary_model_without_a_complaint(kind, folders, caplog, recwarn):
    import torch
    import transformers

    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level("WARNING"):
            model, complaints = transformers.AutoModelForSequenceClassification.from_pretrained(
                folders[kind], output_loading_info=True, attn_implementation="eager"
            )
    finally:
        transformers.utils.logging.disable_propagation()
    assert [record.message for record in caplog.records if record.name.startswith("transformers")] == []
    assert [str(one.message) for one in recwarn if "transformers" in str(one.filename)] == []
    assert not any(complaints.values())
    with torch.no_grad():
        found = model.eval()(torch.tensor(np.asarray(TOKENS)).long(), torch.tensor(np.asarray(MASK))).logits[:, 0]
    config, ours = load_reward_model(folders[kind])
    ours["head"]["bias"] = jnp.float32(0.0)  # which these classes do not have
    np.testing.assert_allclose(found, plain_scorer(config)(ours, TOKENS, MASK).mean, rtol=1e-3, atol=1e-4)


def test_a_plain_folder_is_a_bradley_terry_model(params, tiny_config, tmp_path):
    save_reward_model(tmp_path / "plain", tiny_config, params["bradley_terry"], tokenizer())
    found = load_reward_folder(tmp_path / "plain")
    assert found.kind == "bradley_terry"
    assert_same(found.params, params["bradley_terry"])
    assert jax.eval_shape(found.scorer, found.params, TOKENS, MASK).epistemic is None


def test_what_the_folder_says_of_itself(params, tiny_config, tmp_path):
    about = {"regularisation": 0.5, "responses": np.int64(60), "attributes": ("helpful", "short")}
    folder = save_reward_folder(tmp_path / "out", tiny_config, params["posterior"], tokenizer(), about=about)
    found = json.loads((folder / JSON_FILE).read_text())
    assert found["about"] == {"regularisation": 0.5, "responses": 60, "attributes": ["helpful", "short"]}
    assert (found["kind"], found["pooling"], found["dtype"]) == ("posterior", "last_token", "float32")
    assert found["made_with"] == folder_identity(folder)._asdict()


def test_a_mesh_has_the_parameters_of_one_device(folders, params):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices (tests/conftest.py makes fake ones)")
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    for kind in ("ensemble", "posterior"):
        found = load_reward_folder(folders[kind], placement=on(mesh))
        assert_same(jax.tree.map(np.asarray, found.params), jax.tree.map(np.asarray, params[kind]))
        assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(found.params))


def test_the_hash_of_weights_sees_numbers_names_and_shapes_but_not_files(params, tiny_config, tmp_path):
    model = params["bradley_terry"]
    one = save_reward_model(tmp_path / "one", tiny_config, model, tokenizer())
    many = save_reward_model(tmp_path / "many", tiny_config, model, tokenizer(), max_shard_bytes=600)
    assert len(list(many.glob("model-*.safetensors"))) > 2
    assert folder_identity(one) == folder_identity(many)
    nudged = {**model, "head": {**model["head"], "kernel": model["head"]["kernel"].at[3].add(1e-6)}}
    other = save_reward_model(tmp_path / "other", tiny_config, nudged, tokenizer())
    assert folder_identity(other).weights != folder_identity(one).weights
    assert folder_identity(other)[1:] == folder_identity(one)[1:]
    # By hand: BLAKE2b of each tensor's bytes, then of the list of name, dtype, shape and that.
    from hashlib import blake2b

    from safetensors.numpy import load_file

    listed = [
        (name, "F32", list(array.shape), blake2b(array.tobytes(), digest_size=16).hexdigest())
        for name, array in sorted(load_file(one / "model.safetensors").items())
    ]
    assert folder_identity(one).weights == blake2b(json.dumps(listed).encode(), digest_size=16).hexdigest()


def test_the_hash_of_a_tokenizer_survives_saving_and_sees_template_and_vocabulary(params, tiny_config, tmp_path):
    from rlhf_jax.models.huggingface import load_tokenizer

    def identity(name, tokenizer):
        return folder_identity(save_reward_model(tmp_path / name, tiny_config, params["bradley_terry"], tokenizer))

    first = identity("first", tokenizer())
    again = load_tokenizer(tmp_path / "first")
    again(["abc", "a"], padding="longest", truncation=True, max_length=2)  # which tokenizer.json then remembers
    assert identity("again", again) == first
    other = identity("template", tokenizer(template="{{ messages[-1].content }}"))
    assert other.template != first.template and other.tokenizer == first.tokenizer
    other = identity("vocabulary", tokenizer("~bacdefghijklmn"))
    assert other.template == first.template and other.tokenizer != first.tokenizer
    assert identity("none", tokenizer(template=None)).template != first.template


def test_an_uncertainty_made_with_other_weights_is_refused(folders, params, tiny_config, tmp_path):
    moved = copied(folders["posterior"], tmp_path / "moved")
    nudged = jax.tree.map(lambda leaf: leaf * 1.001, params["bradley_terry"])
    other = save_reward_model(tmp_path / "other", tiny_config, nudged, tokenizer())
    shutil.copyfile(other / "model.safetensors", moved / "model.safetensors")
    then, now = folder_identity(folders["posterior"]).weights, folder_identity(other).weights
    with pytest.raises(
        ValueError, match=f"was made with the weights {then}, and its model has the weights {now}: make"
    ):
        load_reward_folder(moved)
    with pytest.raises(ValueError, match=f"was made with the weights {now}, and its model has the weights {then}"):
        save_reward_folder(
            tmp_path / "new", tiny_config, params["posterior"], tokenizer(), made_with=folder_identity(other)
        )
    assert not (tmp_path / "new").exists()
    own = folder_identity(folders["posterior"])
    save_reward_folder(tmp_path / "new", tiny_config, params["posterior"], tokenizer(), made_with=own)


@pytest.mark.parametrize(
    ("other", "name"), [(tokenizer(template="{{ 1 }}"), "chat template"), (tokenizer("~bacdefghijklmn"), "tokenizer")]
)
def test_an_uncertainty_made_with_another_template_or_tokenizer_is_refused(folders, other, name, tmp_path):
    moved = copied(folders["posterior"], tmp_path / "moved")
    other.save_pretrained(moved)
    then, now = folder_identity(folders["posterior"]), folder_identity(moved)
    field = "template" if name == "chat template" else name
    sentence = f"with the {name} {getattr(then, field)}, and its model has the {name} {getattr(now, field)}"
    with pytest.raises(ValueError, match=sentence):
        load_reward_folder(moved)


def test_an_uncertainty_that_is_used_in_another_dtype_than_it_was_made_in_is_said(folders, recwarn):
    with pytest.warns(UserWarning, match=r"posterior was made in float32 and is used in bfloat16.*--dtype float32"):
        load_reward_folder(folders["posterior"], dtype="bfloat16")
    recwarn.clear()
    load_reward_folder(folders["posterior"])
    assert not [one for one in recwarn if "was made in" in str(one.message)]


def test_damaged_and_mixed_files_are_refused(folders, tmp_path):
    moved = copied(folders["posterior"], tmp_path / "moved")
    whole = (moved / TENSOR_FILE).read_bytes()
    for length in (4, 40, len(whole) - 1):
        (moved / TENSOR_FILE).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{TENSOR_FILE} is damaged or truncated .* copy it again"):
            load_reward_folder(moved)
    (moved / TENSOR_FILE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"is not the file that {JSON_FILE} describes"):
        load_reward_folder(moved)
    (moved / TENSOR_FILE).unlink()
    with pytest.raises(ValueError, match=f"has no {TENSOR_FILE}"):
        load_reward_folder(moved)


def test_descriptions_that_are_not_known_are_refused(folders, tmp_path):
    moved = copied(folders["posterior"], tmp_path / "moved")
    path = moved / JSON_FILE
    original = path.read_text()
    edit(path, kind="oracle")
    with pytest.raises(
        ValueError, match="names the kind 'oracle', which is unknown: known are bradley_terry, ensemble"
    ):
        load_reward_folder(moved)
    path.write_text(original)
    edit(path, options={"levels": 3})
    with pytest.raises(ValueError, match="of kind posterior has no option 'levels'; it has features"):
        load_reward_folder(moved)
    for broken in ({"options": 3}, {"made_with": {"weights": "x"}}):
        path.write_text(original)
        edit(path, **broken)
        with pytest.raises(ValueError, match="is incomplete or of another version"):
            load_reward_folder(moved)


def test_a_policy_has_no_head_and_no_kind(tiny_config, tmp_path):
    policy = init_policy(tiny_config, jax.random.key(0))
    save_policy(tmp_path / "policy", tiny_config, policy, tokenizer())
    with pytest.raises(ValueError, match=r"is not a reward model: it has neither score\.weight"):
        load_reward_folder(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"a dictionary of .*trunk.*: these are parameters of no known kind"):
        save_reward_folder(tmp_path / "new", tiny_config, policy, tokenizer())
    with pytest.raises(ValueError, match=r"Geometry: these are parameters of no known kind .* PosteriorParams"):
        kind_of(Geometry(cholesky=jnp.eye(2)))


def test_options_that_a_kind_does_not_have_are_refused_before_anything_is_written(params, tiny_config, tmp_path):
    with pytest.raises(ValueError, match="of kind posterior has no option 'lead'"):
        save_reward_folder(tmp_path / "new", tiny_config, params["posterior"], tokenizer(), options={"lead": 0})
    with pytest.raises(ValueError, match="of kind lora_ensemble needs the option adapter"):
        save_reward_folder(tmp_path / "new", tiny_config, params["lora_ensemble"], tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_what_was_there(folders, params, tiny_config, tmp_path, monkeypatch):
    from rlhf_jax.training import reward_folders

    there = copied(folders["posterior"], tmp_path / "there")

    def full(path, value):
        raise OSError("no space left on device")

    monkeypatch.setattr(reward_folders, "write_json", full)
    with pytest.raises(OSError, match=r"no space left .* what was there before is unchanged"):
        save_reward_folder(there, tiny_config, params["quantile"], tokenizer())
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert_same(load_reward_folder(there).params, params["posterior"])
    save_reward_folder(there, tiny_config, params["quantile"], tokenizer())
    assert load_reward_folder(there).kind == "quantile"
    with pytest.raises(ValueError, match="holds more than a model"), replaced(tmp_path):
        pass


def test_an_ensemble_of_different_tokenizers_is_refused(folders, tmp_path):
    first = folders["posterior"]
    longer = tokenizer()
    longer.add_tokens(["<more>"])
    for name, one in (("swapped", tokenizer("~bacdefghijklmn")), ("longer", longer)):
        one.save_pretrained(copied(first, tmp_path / name))
    check_same_tokenizer([])
    check_same_tokenizer([first, folders["quantile"], tmp_path / "longer"])
    with pytest.raises(
        ValueError, match=r"swapped has another tokenizer than .* \(2 tokens differ: 'a' is 1 here and 2 there\)"
    ):
        check_same_tokenizer([first, folders["quantile"], tmp_path / "swapped"])
    with pytest.raises(ValueError, match="'<more>' is 16 here and no id there"):
        check_same_tokenizer([tmp_path / "longer", first])
