"""Reward models evaluated side by side on files of several formats, by the script."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.batches import pad_demonstrations
from rlhf_jax.evaluation import statistics
from rlhf_jax.evaluation.sheets import deviations
from rlhf_jax.evaluation.uncertainty import pair_uncertainty
from rlhf_jax.models.huggingface import load_reward_model, load_tokenizer
from rlhf_jax.rewards.bradley_terry import reward_scorer
from rlhf_jax.rewards.ellipsoid import Geometry
from rlhf_jax.rewards.linear_ensemble import LinearEnsembleParams
from rlhf_jax.rewards.posterior import PosteriorParams, draw_heads
from rlhf_jax.training.json_lines import read_lines
from rlhf_jax.training.reward_folders import save_reward_folder
from rlhf_jax.training.reward_kinds import KINDS


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    bootstrap = statistics.bootstrap

    def few(*arguments, n, **options):
        return bootstrap(*arguments, n=min(n, 10), **options)

    monkeypatch.setattr(statistics, "bootstrap", few)


WORDS = ["sat", "ran off", "is red", "was mad"]


@pytest.fixture
def files(tmp_path):
    """LLMBar rows, one of them too long; graded choices; and pairs."""
    llmbar = [
        {"input": f"cat {i}", "output_1": WORDS[i % 4], "output_2": WORDS[(i + 1) % 4], "label": 1 + i % 2}
        | {"subset": "ab"[i // 12], "secret": i}
        for i in range(24)
    ]
    llmbar.append(llmbar[0] | {"output_1": "x" * 80})
    graded = [{"prompt": f"cat {i}", "completions": [f" {w}" for w in WORDS], "gold": [i, 2.5, 1, 0]} for i in range(6)]
    pairs = [{"prompt": f"dog {i}", "chosen": " sat", "rejected": " ran"} for i in range(4)]
    made = {}
    for name, rows in (("llmbar", llmbar), ("graded", graded), ("pairs", pairs)):
        made[name] = tmp_path / f"{name}.jsonl"
        made[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture
def uncertain(rewards, tmp_path):
    """A linear ensemble on the trunk of the first reward model; its members are other heads."""
    config, params = load_reward_model(rewards[0])
    kernel = jax.random.normal(jax.random.key(5), (3, config.width), jnp.float32)
    made = LinearEnsembleParams(
        trunk=params["trunk"], heads={"kernel": kernel, "bias": jnp.zeros(3)}, offset=jnp.zeros(3)
    )
    return str(save_reward_folder(tmp_path / "uncertain", config, made, load_tokenizer(rewards[0])))


def means(summary):
    return {row["name"]: row["mean"] for row in summary["rows"]}


def test_models_side_by_side_and_together(script, rewards, uncertain, files, tmp_path, capsys):
    config = script.Config(
        model=(*rewards, uncertain),
        data=(files["llmbar"], files["graded"]),
        out_of_distribution=(files["pairs"],),
        ensemble=True,
        out=tmp_path / "run",
        batch_size=8,
    )
    summary = script.main(config)
    found, lines = means(summary), read_lines(config.out / "scores.jsonl")
    models = script.names(config.model)
    assert len(lines) == 25 + 6 + 4 and found["llmbar: rows that all models read"] == pytest.approx(24 / 25)
    # Every number again, from the scores that were written.
    kept = [line for line in lines if line["file"] == "llmbar"][:24]
    for model in (*models, "ensemble"):
        scores = np.array([line["scores"][model] for line in kept])
        gold = np.array([line["gold"] for line in kept])
        right = ((scores[:, 0] > scores[:, 1]) == (gold[:, 0] > gold[:, 1])).mean()
        assert found[f"llmbar, {model}: accuracy"] == pytest.approx(right)
    gained = found[f"llmbar, {models[1]}: accuracy"] - found[f"llmbar, {models[0]}: accuracy"]
    assert found[f"llmbar, {models[1]} less {models[0]}: accuracy gained"] == pytest.approx(gained)
    last = lines[24]
    assert last["scores"][models[0]][0] is None and last["scores"][models[0]][1] is not None
    assert lines[5]["extra"] == {"secret": 5} and lines[5]["slices"] == {"subset": "a"}
    assert "cat 5" not in (config.out / "scores.jsonl").read_text()
    # The ensemble is the average of the members, centred on all completions of --data that all of them read.
    scores = {model: [line["scores"][model] for line in lines] for model in (*models, "ensemble")}
    flat = {model: np.array([one for row in rows for one in row], np.float64) for model, rows in scores.items()}
    inside = np.array([line["file"] != "pairs" for line in lines for _ in line["gold"]])
    read = inside & np.all([~np.isnan(flat[model]) for model in models], axis=0)
    centred = [flat[model] - flat[model][read].mean() for model in models]
    np.testing.assert_allclose(flat["ensemble"], np.mean(centred, axis=0), atol=1e-4)
    # The uncertain folder has an uncertainty of its own.
    assert set(lines[0]["epistemic"]) == {models[2], "ensemble"}
    assert f"llmbar, {models[2]}: epistemic: AUROC of errors" in found
    assert f"llmbar, {models[0]}: epistemic: AUROC of errors" not in found
    assert "llmbar against pairs, ensemble: epistemic: AUROC out of distribution" in found
    assert f"llmbar against pairs, {models[0]}: -|margin|: AUROC out of distribution" in found
    gold = [row for row in found if row.startswith("Spearman, reward model accuracy on llmbar ~")]
    assert len(gold) == 1
    # The average of the models is none of them, and three are too few for an interval.
    (over,) = (row for row in summary["rows"] if row["name"] == gold[0])
    assert over["n"] == 3 and over["ci95"] == [None, None]
    # What the models were trained on is the first file, if nobody says otherwise.
    assert {name.split(" against ")[0] for name in found if " against " in name} == {"llmbar"}
    # A short table is printed, however many numbers there are.
    printed = capsys.readouterr().out
    table = printed[printed.index("with 95 % intervals") :].splitlines()
    lines = 2 * len((*models, "ensemble")) + len(["longer", "first", "chance"]) * 2 + len(["best there is"])
    assert len(table) <= lines + 8 and f"All {len(summary['rows'])} numbers are in summary.json" in table[-1]
    assert len(summary["rows"]) > 100 and "accuracy, ties wrong" not in printed
    assert (config.out / "figures" / "report.png").is_file() and "<!doctype html>" in (
        config.out / "report.html"
    ).read_text()


def test_what_margins_say_depends_on_the_kind(script, rewards, uncertain, monkeypatch):
    read = {name: script.options_of(script.Config(), name) for name in (rewards[0], uncertain)}
    assert script.states_of(read, ensemble=True) == dict.fromkeys([*read, "ensemble"], "log_odds")
    kinds = {rewards[0]: "quantile", uncertain: "gaussian"}
    monkeypatch.setattr(script, "kind_in", lambda folder: kinds[folder])
    assert script.RATED <= KINDS.keys()
    assert script.states_of(read, ensemble=True) == dict.fromkeys([*read, "ensemble"], "ratings")
    kinds[uncertain] = "probabilistic"
    mixed = script.states_of(read, ensemble=True)
    assert mixed == {rewards[0]: "ratings", uncertain: "log_odds", "ensemble": None}


def test_completions_of_a_posterior_share_its_head(script, rewards, files, tmp_path):
    config, model = load_reward_model(rewards[0])
    cholesky = jnp.tril(jax.random.normal(jax.random.key(3), (config.width,) * 2)) + 5.0 * jnp.eye(config.width)
    made = PosteriorParams(
        **model, geometry=Geometry(cholesky=cholesky), radius=jnp.asarray(3.0), offset=jnp.asarray(0.0)
    )
    folder = str(save_reward_folder(tmp_path / "posterior", config, made, load_tokenizer(rewards[0])))
    options = script.Config(data=(files["pairs"],), batch_size=8)
    judged = {"pairs": script.load_judged(files["pairs"])}
    (file,) = script.score_all(options, {"one": script.options_of(options, folder)}, judged)
    asked = script.asked_of(file, {"one": "log_odds"})
    # Many heads drawn from the posterior: how far their margins lie apart.
    flat = script.as_candidates(judged["pairs"]).flat
    items = script.read_completions(script.open_source(script.options_of(options, folder)), flat)[0].items
    batch = pad_demonstrations(items, 16, 0)
    features = np.asarray(jax.jit(reward_scorer(config))(model, batch.tokens, batch.mask).features)
    heads = draw_heads(jax.random.key(0), model["head"], made.geometry, made.radius, 20_000)["kernel"]
    drawn = (np.asarray(heads) @ (features[0::2] - features[1::2]).T).std(axis=0)
    found = deviations(asked.sheet, asked.scores["one"])["epistemic"]
    np.testing.assert_allclose(found, drawn, rtol=0.03)  # 6 standard errors of 20 000 draws
    assert not np.allclose(found, pair_uncertainty(*asked.scores["one"].epistemic.reshape(-1, 2).T), rtol=0.06)


def test_new_data_are_set_against_what_the_models_know(script, rewards, files, tmp_path):
    config = script.Config(
        model=rewards[:1],
        data=(files["llmbar"], files["graded"]),
        out_of_distribution=(files["pairs"],),
        batch_size=8,
    )
    rows = script.main(dataclasses.replace(config, in_distribution=(files["graded"],), out=tmp_path / "run"))["rows"]
    assert {row["name"].split(" against ")[0] for row in rows if " against pairs" in row["name"]} == {"graded"}
    for change, sentence in (
        ({"in_distribution": (files["pairs"],)}, "is not among the files of --data"),
        ({"in_distribution": (files["llmbar"],), "out_of_distribution": ()}, "--in-distribution needs --out-of-distr"),
    ):
        with pytest.raises(ValueError, match=sentence):
            script.check(dataclasses.replace(config, **change))


def test_rmb_is_scored_over_its_files(script, tmp_path):
    """Pairs of two goals and lists of one, 1 of 3, 2 of 3 and 3 of 3 right; their prompts are the same three."""
    asked, random = [], np.random.default_rng(0)
    for right, (name, goal) in enumerate((("a", "Helpfulness"), ("b", "Harmlessness"), ("c", "Helpfulness")), start=1):
        rows, scores = [], []
        for i in range(3):
            turns = [{"role": "user", "content": f"cat {i}", "language": "en"}]
            best, other = ({"llm_name": "m", "answer": WORDS[(i + k) % 4], "score": 1.0 - k} for k in (0, 1))
            sides = {"bon_best": best, "loser_list": [other] * 2} if name == "c" else {"chosen": best, "reject": other}
            ids = {"bon_uid": name} if name == "c" else {"pair_uid": name}
            rows.append({"conversation_input": turns, "category_path": f"set/{goal}/x"} | ids | sides)
            mine = random.random(3 if name == "c" else 2)  # of a list the best stands last, of a pair first
            scores += [*mine[:-1], 1.0 + mine[-1] if i < right else -1.0] if name == "c" else [1.0, float(i >= right)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        judged = script.load_judged(tmp_path / f"{name}.json")
        counts = [len(row.gold) for row in judged.rows]
        found = {"one": script.CompletionScores(np.array(scores, np.float32))}
        asked.append(script.asked_of(script.File(name, judged, counts, found), {"one": "log_odds"}))
    rows = {row["name"].removeprefix("all files of RMB, one: "): row for row in script.rmb_scores(asked)}
    assert {name: row["mean"] for name, row in rows.items()} == pytest.approx(
        {
            "RMB: Helpfulness, pairs": 1 / 3,
            "RMB: Harmlessness, pairs": 2 / 3,
            "RMB: Helpfulness, best of n": 1.0,
            "RMB, mean of the 3 of four that are there": 2 / 3,
            "RMB, mean over all": 2 / 3,
        }
    )
    assert {row["n"] for row in rows.values()} == {3}
    assert script.rmb_scores(asked[:1]) == []


def test_short_names(script):
    assert script.names(["runs/a/model", "runs/b/model"]) == ["a", "b"]
    assert script.names(["data/one.jsonl", "data/one.parquet"]) == ["one", "one.parquet"]
    with pytest.raises(ValueError, match="is given twice"):
        script.names(["a/b", "a/b"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": ()}, "--model is missing"),
        ({"data": ()}, "--data is missing"),
        ({"ensemble": True}, "--ensemble needs at least 2 models"),
        ({"format": "mtbench"}, "there is no format 'mtbench'"),
        ({"most": 0}, "most is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"model": ("nowhere",)}, "there is no folder nowhere"),
    ],
)
def test_bad_options_are_one_sentence_and_leave_no_folder(script, rewards, files, tmp_path, change, sentence):
    config = script.Config(model=rewards[:1], data=(files["pairs"],), out=tmp_path / "run")
    with pytest.raises(ValueError, match=sentence):
        script.main(dataclasses.replace(config, **change))
    assert not config.out.exists()


def test_files_in_the_folder_of_the_run_are_not_deleted(script, rewards, files, tmp_path):
    for name in ("data", "out_of_distribution"):
        given = {"data": (files["pairs"],)} | {name: (tmp_path / "run" / "new.jsonl",)}
        with pytest.raises(ValueError, match=r"new\.jsonl lies in --out"):
            script.main(script.Config(model=rewards[:1], out=tmp_path / "run", **given))


def test_a_model_may_not_be_called_as_all_together_are(script, rewards, files, tmp_path):
    (tmp_path / "ensemble").symlink_to(rewards[1])
    config = script.Config(model=(rewards[0], str(tmp_path / "ensemble")), data=(files["pairs"],))
    with pytest.raises(ValueError, match="is called 'ensemble'"):
        script.check(dataclasses.replace(config, ensemble=True))
    assert set(script.check(config)) == {*script.names(config.model)}


def test_a_policy_has_no_reward_head(script, tiny_model, files, tmp_path):
    with pytest.raises(ValueError, match="has no reward head"):
        script.main(script.Config(model=(str(tiny_model),), data=(files["pairs"],), out=tmp_path / "run"))


def test_unknown_rows_and_other_tokenizers_are_refused(script, rewards, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"query": "a", "answer": "b"}\n')
    config = script.Config(model=rewards[:1], data=(data,), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"the columns \['answer', 'query'\], which are those of no known format"):
        script.main(config)
    other = tmp_path / "other"
    other.mkdir()
    for file in script.Path(rewards[1]).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    state = json.loads((other / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="has another tokenizer than"):
        script.main(dataclasses.replace(config, model=(rewards[0], str(other)), ensemble=True))
