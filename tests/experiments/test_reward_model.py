"""Reward modelling from a tiny model, from files to a folder that `transformers` loads."""

import dataclasses
import functools
import importlib.util
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.batches import pad_preferences
from rlhf_jax.evaluation import uncertainty
from rlhf_jax.evaluation.statistics import bootstrap_rows
from rlhf_jax.evaluation.uncertainty import error_auroc, margin_spread, pair_uncertainty
from rlhf_jax.rewards.ellipsoid import solve
from rlhf_jax.training import devices
from rlhf_jax.training.json_lines import read_lines
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.reward_folders import load_reward_folder


@pytest.fixture(scope="module")
def trained(script, tiny_model, pairs, tmp_path_factory):
    """A run's configuration and its summary."""
    config = script.Config(
        model=str(tiny_model),
        data=pairs,
        out=tmp_path_factory.mktemp("trained") / "run",
        steps=4,
        batch_size=4,
        learning_rate=1e-2,
        log_every=2,
        samples=3,
        adapter="lora",
        rank=2,
    )
    return config, script.main(config)


@pytest.fixture
def config(trained, tmp_path):
    return dataclasses.replace(trained[0], out=tmp_path / "run")


def rewards_by_transformers(folder, items):
    """Scores of a `…ForSequenceClassification`, in one padded batch, which is where a wrong pad token shows."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    batch = tokenizer.pad({"input_ids": [item.tokens.tolist() for item in items]}, return_tensors="pt")
    with torch.no_grad():
        return model(**batch).logits[:, 0].numpy()


def test_the_exported_model_gives_the_margins_of_the_summary(script, trained):
    config, summary = trained
    assert json.loads((config.out / "summary.json").read_text()) == summary
    rows = {row["name"]: row for row in summary["rows"]}
    source = script.open_source(config)
    data = script.read_split(config, source, script.PREFERENCE_FORMATS, script.tokenize_preferences)
    both = [pair.chosen for pair in data.held_out] + [pair.rejected for pair in data.held_out]
    scores = rewards_by_transformers(config.out / "model", both)
    chosen, rejected = scores[: len(data.held_out)], scores[len(data.held_out) :]
    assert rows["held-out margin"]["mean"] == pytest.approx((chosen - rejected).mean(), abs=1e-4)
    assert rows["held-out accuracy"]["mean"] == np.mean(chosen > rejected)
    assert rows["held-out accuracy of the longer answer"]["mean"] == 0.5  # all pairs are of equal length
    lines = read_metrics(config.out / "metrics.jsonl")
    assert lines[-1]["eval/ece"] == pytest.approx(rows["held-out calibration error (ECE, 10 bins)"]["mean"])
    text = (config.out / "samples.md").read_text()
    assert text.count("**margin**") == 3 and text.count(" joy ") == 3
    assert (config.out / "figures" / "training.png").is_file()


def test_a_reward_model_goes_on_learning_and_margins_can_be_left_out(script, config, trained):
    first = trained[0]
    changes = dict(adapter=None, margins=False, model=str(first.out / "model"), learning_rate=1e-9)
    script.main(dataclasses.replace(config, **changes))
    last = read_metrics(first.out / "metrics.jsonl")[-1]
    start = read_metrics(config.out / "metrics.jsonl")[0]
    assert start["eval/rewards/margins"] == pytest.approx(last["eval/rewards/margins"], abs=1e-4)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """36 pairs with labels: the chosen completion is the longer one in two of three."""
    rows = [
        {
            "prompt": f"{number}.",
            "chosen": f" joy {'very ' * (number % 3)}",
            "rejected": f" woe{' so' * (number % 3 == 0)}",
            "label": 0.6 + 0.1 * (number % 4),
        }
        for number in range(10, 46)
    ]
    path = tmp_path_factory.mktemp("rows") / "uneven.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_smoothing_dropout_and_lengths_reach_the_run_and_a_resumed_run_is_the_same(
    script, trained, uneven, interrupt, tmp_path
):
    changes = dict(data=uneven, steps=6, log_every=1, save_every=2, smoothing_rate=0.5, dropout=0.2, seed=1)
    config = dataclasses.replace(
        trained[0], adapter=None, balance_lengths=True, augment=0.25, out=tmp_path / "straight", **changes
    )
    summary = script.main(config)
    rows = {row["name"]: row for row in summary["rows"]}
    data = script.read_split(config, script.open_source(config), script.PREFERENCE_FORMATS, script.tokenize_preferences)
    pairs = script.training_pairs(config, data.train, 64)
    copies = [pair for pair in pairs if pair.label is None]
    original = script.completion_lengths([pair for pair in pairs if pair.label is not None])
    assert script.pair_accuracy(*original) == 0.5 and len(copies) == round(0.25 * original.shape[1])
    assert [pair.index for pair in pairs] == list(range(len(pairs)))
    longer = rows["accuracy of the longer answer on the pairs trained on"]
    assert (longer["mean"], longer["n"]) == (script.pair_accuracy(*script.completion_lengths(pairs)), len(pairs))
    labels = rows["label of the pairs seen, after training"]
    assert labels["n"] == min(len(pairs), config.steps * config.batch_size) and 0.0 < labels["mean"] < 1.0
    lines = read_metrics(config.out / "metrics.jsonl")
    means = [line["rewards/labels"] for line in lines if "rewards/labels" in line]
    assert len(means) == config.steps and all(0.0 < mean < 1.0 for mean in means)

    again = dataclasses.replace(config, out=tmp_path / "resumed")
    interrupt(again, script, number=4)
    script.main(dataclasses.replace(again, resume=True))
    names = ("loss/reward", "rewards/labels", "eval/rewards/margins")
    pick = [[line.get(name) for name in names] for line in lines]
    resumed = read_metrics(again.out / "metrics.jsonl")
    assert [[line.get(name) for name in names] for line in resumed] == pick


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing_rate": 2.0}, "the smoothing rate is 2.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"augment": -0.5}, "the share of augmented pairs is -0.5"),
    ],
)
def test_options_out_of_their_range_are_refused_before_the_model_is_read(script, config, options, message):
    changes = {"model": "no/such/model"} | options
    with pytest.raises(ValueError, match=message):
        script.main(dataclasses.replace(config, **changes))
    assert not config.out.exists()


def test_best_and_worst_margins(script):
    rows = [{"prompt": str(number), "chosen": "c", "rejected": "r"} for number in range(4)]
    data = script.Split(train=[], held_out=[], rows=rows)
    shown = script.extremes(data, np.array([0.5, -1.0, 2.0, 0.0]), 3)
    assert [(sample["margin"], sample["prompt"]) for sample in shown] == [
        ("2.000", "2"),
        ("0.500", "0"),
        ("-1.000", "1"),
    ]


def test_a_policy_cannot_be_trained_on_demonstrations_here(script, config, demonstrations):
    with pytest.raises(ValueError, match=r"not chosen \+ rejected"):
        script.main(dataclasses.replace(config, data=demonstrations))
    assert not config.out.exists()


KINDS = {
    "linear_ensemble": {"members": 3, "prior_decay": 0.1, "bootstrap": True},
    "dropout": {"members": 4, "dropout": 0.2, "adapter": "lora"},
    "posterior": {"regularisation": 2.0, "adapter": "lora"},
    "probabilistic": {},
    "lora_ensemble": {"adapter": "lora", "bootstrap": True},
}


@pytest.fixture(scope="module")
def of_kind(script, trained, tmp_path_factory):
    """`of_kind(kind)`: the configuration, the summary and the folder of a tiny run, made once with short bootstraps."""
    out = tmp_path_factory.mktemp("kinds")

    @functools.cache
    def run(kind):
        config = dataclasses.replace(
            trained[0], out=out / kind, kind=kind, adapter=None, steps=2, learning_rate=3e-2, log_every=1
        )
        config = dataclasses.replace(config, **KINDS[kind])
        if kind == "lora_ensemble":  # the second stage
            config = dataclasses.replace(config, model=str(run("linear_ensemble")[0].out / "model"))
        return config, script.main(config), load_reward_folder(config.out / "model")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uncertainty, "bootstrap_rows", functools.partial(bootstrap_rows, draws=20))
        yield run


def other_script(name):
    path = Path(__file__).resolve().parents[2] / "experiments" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"{name}_beside_reward_model", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def split_of(script, config):
    source = script.open_source(config)
    return script.read_split(config, source, script.PREFERENCE_FORMATS, script.tokenize_preferences)


def scores_of(folder, pairs):
    """The Score of the chosen and of the rejected completions, by the folder alone."""
    batch = pad_preferences(pairs, 24, 0)
    scorer = jax.jit(folder.scorer)
    sides = [scorer(folder.params, side.tokens, side.mask) for side in (batch.chosen, batch.rejected)]
    return [jax.tree.map(np.asarray, side) for side in sides]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_each_kind_scores_as_the_summary_says(script, of_kind, kind):
    config, summary, folder = of_kind(kind)
    assert folder.kind == kind
    held_out = split_of(script, config).held_out
    chosen, rejected = scores_of(folder, held_out)
    rows = {row["name"]: row["mean"] for row in summary["rows"]}
    margin = chosen.mean - rejected.mean
    assert rows["held-out margin"] == pytest.approx(margin.mean(), abs=1e-4)
    assert rows["held-out accuracy"] == pytest.approx(np.mean(margin > 0))
    last = read_metrics(config.out / "metrics.jsonl")[-1]
    assert last["eval/rewards/margins"] == pytest.approx(margin.mean(), abs=1e-4)

    name = "aleatoric" if kind == "probabilistic" else "epistemic"
    both = np.concatenate([getattr(chosen, name), getattr(rejected, name)])
    assert rows[f"{name} standard deviation of a held-out completion"] == pytest.approx(both.mean(), rel=1e-3)
    assert both.min() > 0
    if kind == "posterior":  # one head for both
        shape = folder.params.geometry
        sides = [folder.params.radius * solve(shape, jnp.asarray(side.features)) for side in (chosen, rejected)]
        doubt = np.linalg.norm(np.subtract(*map(np.asarray, sides)), axis=1)
    elif chosen.members is None:
        doubt = pair_uncertainty(getattr(chosen, name), getattr(rejected, name))
    else:
        doubt = margin_spread(chosen.members, rejected.members)
        centres = np.concatenate([chosen.members, rejected.members], axis=1).mean(axis=1)
        np.testing.assert_allclose(centres, np.zeros_like(centres), atol=1e-5)
        assert len(centres) == (3 if "ensemble" in kind else 4)
    assert rows[f"{name} standard deviation of a held-out margin"] == pytest.approx(doubt.mean(), rel=1e-3)
    for by, values in ((name, doubt), ("-|margin|", -np.abs(margin))):
        found = rows[f"{by}: AUROC of errors"]
        expected = error_auroc(margin > 0, values.astype(np.float64))
        assert (found is None) if np.isnan(expected) else (found == pytest.approx(expected))
        assert 0.0 <= rows[f"{by}: area under accuracy-coverage"] <= 1.0
    if kind != "lora_ensemble":  # its mean is of several trunks
        by_transformers = rewards_by_transformers(
            config.out / "model", [pair.chosen for pair in held_out] + [pair.rejected for pair in held_out]
        ).reshape(2, -1)
        np.testing.assert_allclose(by_transformers[0] - by_transformers[1], margin, atol=1e-4)
    about = json.loads((config.out / "model" / "uncertainty.json").read_text())["about"]
    assert about["pairs"] == len(split_of(script, config).train) and about["held_out"] == len(held_out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_of_four_devices_teaches_each_kind_what_one_device_does(script, of_kind, monkeypatch, tmp_path, kind):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices (tests/conftest.py makes fake ones)")
    config, _, folder = of_kind(kind)
    monkeypatch.setattr(devices, "make_mesh", functools.partial(devices.make_mesh, devices=jax.devices()[:4]))
    found = []
    monkeypatch.setattr(script, "uncertainty_rows", lambda *sides: found.extend(sides) or [])
    for name, nothing in (("table_of", []), ("write_samples", None), ("finish", {})):  # which take long
        monkeypatch.setattr(script, name, lambda *_, nothing=nothing: nothing)
    split = dataclasses.replace(config, mesh="data=2,fsdp=2", out=tmp_path / "split")
    script.main(split)
    one, four = (read_metrics(run.out / "metrics.jsonl") for run in (config, split))
    for name in ("loss/reward", "rewards/margins", "grad_norm", "eval/rewards/margins"):
        by_four, by_one = ([line[name] for line in lines if name in line] for lines in (four, one))
        assert len(by_one) == 2 and by_four == pytest.approx(by_one, rel=1e-5, abs=1e-5), name
    expected = scores_of(folder, split_of(script, config).held_out)
    # The rewards of one head are free up to a constant, which rounding decides here.
    margins = [chosen.mean - rejected.mean for chosen, rejected in (found, expected)]
    np.testing.assert_allclose(*margins, atol=1e-4)
    for name, side in itertools.product(("epistemic", "aleatoric", "members"), range(2)):
        if getattr(expected[side], name) is not None:
            np.testing.assert_allclose(getattr(found[side], name), getattr(expected[side], name), atol=1e-4)


def test_a_posterior_is_made_of_the_features_of_the_training_pairs(script, of_kind):
    config, _, folder = of_kind("posterior")
    chosen, rejected = (side.features for side in scores_of(folder, split_of(script, config).train))
    difference = (chosen - rejected).astype(np.float64)
    probability = 1 / (1 + np.exp(-difference @ np.asarray(folder.params.head["kernel"], np.float64)))
    fisher = 2.0 * np.eye(16) + difference.T @ (difference * (probability * (1 - probability))[:, None])
    cholesky = np.asarray(folder.params.geometry.cholesky)
    np.testing.assert_allclose(cholesky @ cholesky.T, fisher, rtol=1e-3, atol=1e-3)
    assert float(folder.params.radius) == 1.0 and float(folder.params.offset) == 0.0


def test_a_posterior_of_a_finished_reward_model_takes_no_step(script, trained, tmp_path):
    first = trained[0]
    defaults = {name: getattr(script.Config(), name) for name in ("steps", "learning_rate", "adapter")}
    config = dataclasses.replace(
        first, kind="posterior", frozen=True, model=str(first.out / "model"), out=tmp_path / "frozen", **defaults
    )
    summary = script.main(config)
    rows = {row["name"]: row["mean"] for row in summary["rows"]}
    assert rows["held-out margin"] == pytest.approx(
        {row["name"]: row["mean"] for row in trained[1]["rows"]}["held-out margin"], abs=1e-5
    )
    assert [line["step"] for line in read_metrics(config.out / "metrics.jsonl")] == [0]
    found, given = load_reward_folder(config.out / "model"), load_reward_folder(first.out / "model").params
    for part in ("trunk", "head"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found.params, part), given[part])
    chosen, rejected = (side.features for side in scores_of(found, split_of(script, config).train))
    difference = (chosen - rejected).astype(np.float64)
    probability = 1 / (1 + np.exp(-difference @ np.asarray(given["head"]["kernel"], np.float64)))
    fisher = np.eye(16) + difference.T @ (difference * (probability * (1 - probability))[:, None])
    cholesky = np.asarray(found.params.geometry.cholesky)
    np.testing.assert_allclose(cholesky @ cholesky.T, fisher, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"--frozen leaves the reward model as it is, and .* has no reward head"):
        script.main(dataclasses.replace(config, model=first.model, out=tmp_path / "headless"))
    assert not (tmp_path / "headless").exists()


def test_members_of_a_second_stage_share_the_trunk_of_the_first(of_kind):
    first, second = (of_kind(kind)[2].params for kind in ("linear_ensemble", "lora_ensemble"))
    jax.tree.map(np.testing.assert_array_equal, second.base["trunk"], first.trunk)
    assert not np.array_equal(second.heads["kernel"], first.heads["kernel"])


def test_an_ensemble_goes_on_learning_with_its_heads(script, of_kind, tmp_path):
    first, _, folder = of_kind("linear_ensemble")
    config = dataclasses.replace(
        first, model=str(first.out / "model"), members=None, learning_rate=1e-9, out=tmp_path / "again"
    )
    script.main(config)
    again = load_reward_folder(config.out / "model").params
    np.testing.assert_allclose(again.heads["kernel"], folder.params.heads["kernel"], atol=1e-6)
    with pytest.raises(ValueError, match=r"--members is 5, and the ensemble in .* has 3 heads"):
        script.main(dataclasses.replace(config, members=5, out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["linear_ensemble", "lora_ensemble"])
def test_a_resumed_ensemble_equals_an_uninterrupted_one(script, of_kind, interrupt, tmp_path, kind):
    config, _, folder = of_kind(kind)
    again = dataclasses.replace(config, out=tmp_path / "resumed", save_every=1)
    interrupt(again, script, number=2)
    script.main(dataclasses.replace(again, resume=True))
    resumed = load_reward_folder(again.out / "model").params
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), resumed, folder.params)


@pytest.mark.parametrize("kind", ["linear_ensemble", "posterior"])
def test_doubts_are_held_against_a_score_and_a_policy(script, of_kind, tiny_model, demonstrations, tmp_path, kind):
    config, _, folder = of_kind(kind)
    reward = (str(config.out / "model"),)
    scoring = other_script("score")
    scoring.main(
        scoring.Config(
            reward=reward, data=config.data, rule="lower_confidence_bound", penalty=2.0, out=tmp_path / "scores"
        )
    )
    everything = dataclasses.replace(config, eval_data=config.data)
    pairs = split_of(script, everything).train
    chosen, rejected = (side.mean - 2.0 * side.epistemic for side in scores_of(folder, pairs))
    found = np.array([line["scores"] for line in read_lines(tmp_path / "scores" / "scores.jsonl")])
    np.testing.assert_allclose(found, np.stack([chosen, rejected], axis=1), atol=1e-4)

    ppo = other_script("ppo")
    summary = ppo.main(
        ppo.Config(
            model=str(tiny_model),
            data=demonstrations,
            reward=reward,
            rule="lower_confidence_bound",
            out=tmp_path / "ppo",
            steps=1,
            batch_size=4,
            reference_samples=8,
            response_length=6,
            most_held_out=4,
            samples=1,
            value_net="shared",
        )
    )
    assert all(check["pass"] for check in summary["checks"])
    logged = [line for line in read_metrics(tmp_path / "ppo" / "metrics.jsonl") if "uncertainty/mean" in line]
    assert logged and all(line["uncertainty/mean"] > 0 for line in logged)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 5}, "--kind bradley_terry does not use --members: leave it out, or choose linear_ensemble"),
        ({"kind": "posterior", "bootstrap": True}, "--kind posterior does not use --bootstrap"),
        ({"kind": "dropout", "dropout": 0.1, "geometry": "pairs"}, "does not use --geometry.*choose posterior"),
        ({"kind": "probabilistic", "adapter": "lora"}, "--kind probabilistic does not use --adapter"),
        ({"kind": "probabilistic", "centring": 0.1}, "--kind probabilistic does not use --centring"),
        ({"kind": "linear_ensemble", "smoothing_rate": 0.5}, "--kind linear_ensemble does not use --smoothing-rate"),
        ({"kind": "linear_ensemble", "weight_decay": 0.1}, r"--weight-decay would pull all heads .* \(--prior-decay"),
        ({"kind": "linear_ensemble", "members": 1}, "--members is 1: one member never disagrees; give 2 or more"),
        ({"kind": "linear_ensemble", "prior_decay": -1.0}, "--prior-decay is -1.0: give 0 or more"),
        ({"kind": "posterior", "regularisation": 0.0}, "--regularisation is 0.0: give more than 0"),
        ({"kind": "dropout"}, "--kind dropout needs --dropout"),
        ({"kind": "lora_ensemble"}, "--kind lora_ensemble trains an adapter a member: give --adapter lora"),
        ({"kind": "lora_ensemble", "adapter": "lora"}, "there is no folder no/such/model"),
        ({"kind": "lora_ensemble", "adapter": "lora", "model": "."}, "--model . is none: train one first"),
        ({"frozen": True}, "--kind bradley_terry does not use --frozen: leave it out, or choose posterior"),
        ({"kind": "posterior", "frozen": True}, "--frozen takes no step, so nothing reads --steps"),
    ],
)
def test_options_that_the_kind_does_not_read_are_refused_before_the_model_is_read(script, config, options, message):
    with pytest.raises(ValueError, match=message):
        script.main(dataclasses.replace(config, **({"model": "no/such/model", "adapter": None} | options)))
    assert not config.out.exists()
