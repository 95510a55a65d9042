"""The over-optimisation study at a tiny size: what it leaves behind, that it repeats, and what it refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rlhf_jax.laboratory.options import METHODS, Options
from rlhf_jax.training import checkpoints, run_folder
from rlhf_jax.training.command_line import run
from rlhf_jax.training.metrics import read_metrics

TINY = Options(
    seeds=2,
    members=2,
    pairs=32,
    updates=4,
    report_every=2,
    rollouts=8,
    sft_steps=4,
    reward_epochs=1,
    reward_batch=16,
    best_of_n=8,
    held_out=2,
    policy_layers=1,
    width=8,
)
LANES = len(METHODS) * TINY.seeds


@pytest.fixture(scope="module")
def calls():
    """What the study's `train_policies` and `report` were given, and what they returned."""
    return {}


@pytest.fixture(scope="module")
def finished(script, calls, tmp_path_factory):
    def recorded(name):
        function = getattr(script, name)

        def call(*arguments):
            returned = function(*arguments)
            calls[name] = arguments, returned
            return returned

        return call

    folder = tmp_path_factory.mktemp("study") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_policies", "report"):
            patch.setattr(script, name, recorded(name))
        return script.main(dataclasses.replace(TINY, out=folder)), folder


def history_of(folder):
    with np.load(folder / "history.npz") as history:
        return {name: history[name] for name in history.files}


def check_what_is_left(result, folder, lanes):
    assert json.loads((folder / "summary.json").read_text()) == result
    assert set(result) == {"experiment", "config", "device", "seconds", "rows", "checks"}
    assert set(result["seconds"]) == {"total", "compile"}
    assert all(set(row) == {"name", "unit", "mean", "sd", "n", "ci95"} for row in result["rows"])
    assert all(set(check) == {"name", "value", "expected", "tolerance", "pass"} for check in result["checks"])
    assert json.loads((folder / "config.json").read_text())["config"] == result["config"]
    assert {"overoptimization.png", "training.png", "final_gold.png", "uncertainty.png"} <= {
        path.name for path in (folder / "figures").iterdir()
    }
    for name in ("initial_policy", "reward_models", "policies"):
        assert (folder / "checkpoints" / name).is_dir()
    written = read_metrics(folder / "metrics.jsonl")
    lines = [line for line in written if "objective/gold" not in line]
    steps = {line["step"] for line in lines}
    assert len(lines) == lanes * len(steps)
    history = history_of(folder)
    # Gold is known after training; its lines follow the others, one a lane and report.
    gold = np.array([line["objective/gold"] for line in written[len(lines) :]]).reshape(lanes, len(steps))
    np.testing.assert_allclose(gold.mean(axis=1), history["gold"].mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)
    assert all(np.isfinite(values).all() for values in history.values())
    # The last two checks hold at any size: the policy that is updated is the one that sampled.
    assert [check["pass"] for check in result["checks"][1:]] == [True, True]
    return history, lines


def test_it_leaves_its_numbers_figures_samples_and_checkpoints(finished):
    result, folder = finished
    history, lines = check_what_is_left(result, folder, LANES)
    assert [line["step"] for line in lines] == [2] * LANES + [4] * LANES
    assert history["gold"].shape == history["proxy"].shape == (LANES, 4, 8)
    assert history["kl"].shape == (LANES, 4)
    assert (folder / "figures" / "best_of_n.png").is_file()
    assert result["experiment"] == "overoptimization"
    assert result["config"]["width"] == 8


def test_rows_are_the_numbers_of_the_history(finished):
    result, folder = finished
    history, rows = history_of(folder), {row["name"]: row for row in result["rows"]}
    for place, method in enumerate(METHODS):
        mine = slice(2 * place, 2 * place + 2)
        final = history["gold"][mine, 2:].mean(axis=(1, 2))
        row = rows[f"{method}, β = 0: final gold"]
        assert row["n"] == 2
        np.testing.assert_allclose(row["mean"], final.mean(), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(row["sd"], final.std(ddof=1), rtol=1e-6)
        kl = history["kl"][mine, 2:].mean()
        np.testing.assert_allclose(rows[f"{method}, β = 0: final KL"]["mean"], kl, rtol=1e-4, atol=1e-6)
        if method != "PPO":
            paired = rows[f"{method}, β = 0 minus PPO: final gold, paired"]["mean"]
            plain = rows["PPO, β = 0: final gold"]["mean"]
            np.testing.assert_allclose(paired, final.mean() - plain, rtol=1e-5, atol=1e-9)
    for place in (0, 1):
        accuracy = rows[("reward model", "ensemble mean")[place] + ": accuracy on clean labels"]
        assert 0.0 <= accuracy["mean"] <= 1.0


def test_methods_begin_with_the_same_responses(finished):
    """Before the first update all policies are the same, and so is the noise of a seed: so is the gold."""
    _, folder = finished
    gold = history_of(folder)["gold"][:, 0].reshape(len(METHODS), 2, -1)
    np.testing.assert_array_equal(gold, np.broadcast_to(gold[:1], gold.shape))
    assert np.abs(history_of(folder)["kl"][:, 0]).max() < 1e-4


def test_samples_show_the_gold_of_the_history(finished):
    _, folder = finished
    section = (folder / "samples.md").read_text().split("## Before training")[1].split("##")[0]
    shown = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith(("| +", "| -"))]
    assert shown == [f"{value:+.2f}" for value in history_of(folder)["gold"][0, 0]]


def test_the_same_seed_gives_the_same_numbers(script, finished, calls, tmp_path, monkeypatch):
    """Training is given the same bits, and its history is summed up alike; training itself is one program of those."""
    result, folder = finished
    given, returned = calls["train_policies"]

    def training(*again):
        (options, setting, proxies, key, _), (before, setting_before, proxies_before, key_before, _) = again, given
        assert dataclasses.replace(options, out=None) == dataclasses.replace(before, out=None)
        assert key == key_before
        jax.tree.map(
            np.testing.assert_array_equal,
            (setting.policy, setting.trunks, setting.world.prompts, proxies),
            (setting_before.policy, setting_before.trunks, setting_before.world.prompts, proxies_before),
        )
        return returned

    monkeypatch.setattr(script, "train_policies", training)
    other = script.main(dataclasses.replace(TINY, out=tmp_path / "run"))
    assert other["rows"] == result["rows"]
    assert other["checks"] == result["checks"]
    for name, values in history_of(folder).items():
        np.testing.assert_array_equal(history_of(tmp_path / "run")[name], values)
    written = read_metrics(folder / "metrics.jsonl")
    gold = [line for line in written if "objective/gold" in line]
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == gold


def test_the_proxy_only_rises_with_n(finished, calls):
    (_, curves, *_), _ = calls["report"]
    assert list(curves) == ["single", "mean", "WCO", "UWO"]
    for curve in curves.values():
        assert curve["n"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
        assert (np.diff(curve["proxy"], axis=1) >= -1e-9).all()


def test_trained_policies_are_on_disk(finished):
    _, folder = finished
    one = checkpoints.restore(
        folder / "checkpoints" / "initial_policy", _shapes_on_disk(folder / "checkpoints" / "initial_policy")
    )
    every = checkpoints.restore(
        folder / "checkpoints" / "policies", _shapes_on_disk(folder / "checkpoints" / "policies")
    )
    for initial, trained in zip(jax.tree.leaves(one), jax.tree.leaves(every), strict=True):
        assert trained.shape == (LANES, *initial.shape)
        assert (np.asarray(trained) != np.asarray(initial)).any()


def _shapes_on_disk(path):
    import orbax.checkpoint as orbax

    with orbax.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path.absolute()).item_metadata.tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_a_neural_gold_and_two_kl_coefficients(script, finished, calls, tmp_path, monkeypatch):
    """What comes before training and after it; in its place stand lanes of the study above."""
    _, (history, policies) = calls["train_policies"]
    lanes = [2 * METHODS.index(method) + seed for method in ("PPO", "AdvPO") for _ in range(2) for seed in range(2)]
    picked = jax.tree.map(lambda values: values[lanes, :2], history)
    monkeypatch.setattr(script, "train_policies", lambda *_: (picked, policies))
    options = dataclasses.replace(
        TINY,
        out=tmp_path / "run",
        gold="neural",
        methods=("PPO", "AdvPO"),
        kl_coefficients=(0.0, 0.1),
        updates=2,
        report_every=1,
        best_of_n=0,
    )
    result = script.main(options)
    names = {row["name"] for row in result["rows"]}
    assert {"PPO, β = 0.1: final gold", "AdvPO, β = 0 minus PPO: final gold, paired"} <= names
    figures = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert {"overoptimization_kl_0.png", "overoptimization_kl_0.1.png"} <= figures
    assert "best_of_n.png" not in figures
    assert history_of(tmp_path / "run")["gold"].shape == (8, 2, 8)


# Real weights and text.


def real_options(shared_data, folder, rows: int = 12, **changes) -> Options:
    prompts, sentiment = folder / "prompts.jsonl", folder / "sentiment.jsonl"
    source = (shared_data / "corpus" / "tinystories_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts.write_text("\n".join(sorted(source, key=len)[:rows]) + "\n", encoding="utf-8")
    labelled = (shared_data / "classification" / "mr_polarity.jsonl").read_text(encoding="utf-8").splitlines()
    sentiment.write_text("\n".join(labelled[:200] + labelled[-200:]) + "\n", encoding="utf-8")
    return dataclasses.replace(
        TINY,
        preset="real",
        policy=shared_data / "weights" / "stories260K_hf",
        prompts=prompts,
        sentiment=sentiment,
        pairs=16,
        response_length=6,
        best_of_n=0,
        updates=2,
        report_every=1,
        methods=("PPO", "UWO", "AdvPO"),
        out=folder / "run",
        **changes,
    )


@pytest.mark.slow
def test_a_pretrained_policy_on_text(script, shared_data, tmp_path):
    result = script.main(real_options(shared_data, tmp_path))
    history, _ = check_what_is_left(result, tmp_path / "run", 6)
    assert history["gold"].shape == (6, 2, 8)


# Bad input: one clear sentence, and exit status 2.


@pytest.fixture
def call(script, monkeypatch, capsys):
    """What the command line prints to standard error for a mistake; it must exit with 2."""

    def call(*arguments) -> str:
        monkeypatch.setattr("sys.argv", [script.__file__, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run(script.main, script.PRESETS, script.__doc__)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return call


@pytest.mark.parametrize(("arguments", "message"), [
    (["--preset", "tiny"], "error: there is no preset 'tiny'; choose one of demo, full, real."),
    (["--advpo-multiple", "-1"], "error: the squared radius B of AdvPO is negative"),
    (["--advpo-value", "-1"], "error: the squared radius B of AdvPO is negative"),
    (["--members", "1"], "error: one member is no ensemble for mean, WCO, UWO: give --members 2 or more"),
    (["--updates", "61"], "error: report-every 5 does not divide updates 61; choose a divisor."),
    (["--preset", "real"], "error: this needs --policy FOLDER"),
])  # fmt: skip
def test_bad_options_end_in_one_sentence_before_a_folder_is_made(call, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    error = call(*arguments)
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_ends_in_2(call):
    assert "--sedes" in call("--sedes", "3")


def test_a_policy_folder_without_config_is_named(call, tmp_path):
    (tmp_path / "model").mkdir()
    files = tmp_path / "p.jsonl", tmp_path / "s.jsonl"
    error = call("--policy", tmp_path / "model", "--prompts", files[0], "--sentiment", files[1])
    assert error.startswith("error: ")
    assert "is not a model folder: it has no config.json" in error


def real_words(options, *more):
    return ["--policy", options.policy, "--prompts", options.prompts, "--sentiment", options.sentiment, *more]


@pytest.mark.parametrize(("lines", "more", "message"), [
    ("", [], "holds no rows"),
    ('{"prompt": "' + "once upon a time " * 400 + '"}\n', [], "more than the limit of"),
    ('{"text": "once"}\n', [], "has no column 'prompt'"),
    ('{"prompt": "once"}\n', [], "leaves none to train on after 32 are held out"),
    ('{"prompt": "once"}\n' * 8, ["--held-out", "2", "--pairs", "5", "--reward-batch", "4"],
     "6 training prompts need as many comparisons"),
])  # fmt: skip
def test_bad_prompts_are_named_and_cost_no_earlier_run(call, shared_data, tmp_path, lines, more, message):
    options = real_options(shared_data, tmp_path)
    options.prompts.write_text(lines)
    folder = run_folder.create(options.out, "overoptimization", options).path
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    error = call(*real_words(options, "--out", folder, "--overwrite", *more))
    assert error.startswith("error: ")
    assert message in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("arguments", [[], ["--overwrite", "--updates", "7"], ["--overwrite", "--minibatches", "3"]])
def test_an_earlier_run_is_not_touched(call, tmp_path, arguments):
    folder = run_folder.create(tmp_path / "run", "overoptimization", TINY).path
    (folder / "history.npz").write_bytes(b"numbers")
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    error = call("--out", folder, *arguments)
    assert error.startswith("error: ")
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before
    if not arguments:
        assert "is not empty: choose another with --out, or replace its run with --overwrite" in error


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        (lambda prompts, tokens, mask: np.full(len(prompts), np.nan), "the gold reward returned nan for row 0"),
        (lambda prompts, tokens, mask: np.ones(len(prompts)), "the gold reward is the same for all samples"),
    ],
)
def test_a_gold_reward_that_says_nothing_is_refused(script, finished, calls, monkeypatch, tmp_path, gold, message):
    (_, setting, *_), _ = calls["train_policies"]
    broken = setting._replace(world=setting.world._replace(gold=gold))
    monkeypatch.setattr(script, "builtin_setting", lambda options, key: broken)
    with pytest.raises(ValueError, match=message):
        script.main(dataclasses.replace(TINY, out=tmp_path / "run"))
