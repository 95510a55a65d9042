"""What is measured of models on judged rows, against plain loops; and the page that shows it."""

import base64
import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.stats import norm

from rlhf_jax.data.judged import JudgedRow
from rlhf_jax.evaluation import model_report, statistics
from rlhf_jax.evaluation.model_measures import baselines, compare_rows, measure, mismatch_rows, new_data_rows
from rlhf_jax.evaluation.model_report import report_figure, report_html
from rlhf_jax.evaluation.official_scores import official_rows, rmb_score_rows
from rlhf_jax.evaluation.overview import FileReport, lines_of, print_overview, uncalibrated
from rlhf_jax.evaluation.sheets import (
    MOST_PAIRS,
    TRIVIAL,
    WRONG_SIGN,
    Scores,
    deviations,
    sheet,
    stated_log_odds,
    uncertainties,
)
from rlhf_jax.evaluation.uncertainty import error_auroc


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Intervals of 20 draws: their own tests look at them, here it is the numbers that count."""
    bootstrap = statistics.bootstrap

    def few(*arguments, n, **options):
        return bootstrap(*arguments, n=min(n, 20), **options)

    monkeypatch.setattr(statistics, "bootstrap", few)


def judged(gold, slices=None, votes=(), extra=None, prompt="Who?"):
    places = range(len(gold))
    pairs = tuple((i, j) for i in places for j in places if gold[i] > gold[j])
    return JudgedRow("", prompt, ["x"] * len(gold), tuple(map(float, gold)), pairs, slices or {}, votes, extra or {})


def asked(golds, format="choices", slices=None, lengths=None, **columns):
    columns = {"prompt": [f"Who is {i}?" for i in range(len(golds))]} | columns
    rows = [
        judged(gold, None if slices is None else slices[i], **{name: values[i] for name, values in columns.items()})
        for i, gold in enumerate(golds)
    ]
    count = sum(map(len, golds))
    return sheet("file", format, rows, list(range(count)) if lengths is None else lengths.tolist())


def means(rows):
    return {row["name"]: row["mean"] for row in rows}


def random_sheet(rows=12, completions=4, seed=0):
    generator = np.random.default_rng(seed)
    golds = generator.normal(size=(rows, completions)).round(2).tolist()
    lengths = generator.integers(5, 40, rows * completions).astype(float)
    scores = np.concatenate(golds) + generator.normal(size=rows * completions)
    members = scores + generator.normal(size=(3, scores.size))
    return asked(golds, lengths=lengths), Scores(scores, members.std(axis=0), np.abs(scores), members)


def test_completions_are_laid_end_to_end():
    found = asked([[1, 0], [0, 0, 1], [0.5, 0.5]])
    assert found.starts.tolist() == [0, 2, 5, 7]
    assert list(zip(found.better, found.worse, found.row, strict=True)) == [(0, 1, 0), (4, 2, 1), (4, 3, 1)]
    assert [part.tolist() for part in found.by_row(found.gold)] == [[1, 0], [0, 0, 1], [0.5, 0.5]]
    assert found.several and found.groups is not None and asked([[1, 0]] * 2).groups is None


def test_rows_with_many_pairs_give_some_of_them():
    found = asked([list(range(11))] * 3)
    assert np.bincount(found.row).tolist() == [MOST_PAIRS] * 3
    assert (found.gold[found.better] > found.gold[found.worse]).all()
    again = asked([list(range(11))] * 3)
    assert (again.better == found.better).all() and len(set(zip(found.better, found.worse, strict=True))) == 27


def test_accuracy_by_a_loop():
    given, scores = random_sheet()
    right, longer, n = 0.0, 0.0, 0
    for row, score, length in zip(given.rows, given.by_row(scores.mean), given.by_row(given.lengths), strict=True):
        for better, worse in row.pairs:
            right += 1.0 if score[better] > score[worse] else 0.0
            longer += (1.0 + np.sign(length[better] - length[worse])) / 2.0
            n += 1
    found = means(measure(given, scores).rows)
    assert found["accuracy"] == pytest.approx(right / n)
    assert found["accuracy over the longer completion"] == pytest.approx((right - longer) / n)
    assert means(baselines(given))["accuracy of the longer completion"] == pytest.approx(longer / n)
    assert means(baselines(given))["best found by chance"] == pytest.approx(0.25)


def test_rows_of_one_prompt_are_resampled_together():
    golds, prompts = [[1, 0], [0, 1]] * 20, [f"Who is {i // 8}?" for i in range(40)]  # five prompts of eight rows
    subsets = [{"subset": "all", "section": "one", "category": "a"}] * 40
    one, scores = asked(golds, slices=subsets, prompt=prompts), np.random.default_rng(0).normal(size=80)
    assert one.prompt.tolist() == [i // 8 for i in range(40)]
    rows = measure(one, Scores(scores, np.ones(80))).rows + compare_rows(one, Scores(scores), Scores(one.gold))
    assert {row["n"] for row in rows} == {5}
    found = new_data_rows((one, Scores(scores, np.ones(80))), (one, Scores(scores, np.ones(80))))
    assert {row["n"] for row in found} == {10}  # the prompts of two files
    battles = [{"model_a": f"m{i % 3}", "model_b": f"m{(i + 1) % 3}"} for i in range(40)]
    for format in ("reward_bench", "rmb_pairwise", "auto_j", "reward_bench_2", "ppe_correctness", "ppe_human"):
        given = asked(golds, format, subsets, prompt=prompts, extra=battles)
        known = official_rows(given, Scores(scores))
        known = [row for row in known if not re.match("PPE: [2-7] ", row["name"])]  # these resample three models
        assert known and {row["n"] for row in known} == {5}
    several = asked([[1, 0, 0]] * 40, "rmb_best_of_n", subsets, prompt=prompts)
    answered = Scores(np.arange(120.0) % 7)
    rows = baselines(several) + official_rows(several, answered) + measure(several, answered).rows
    assert {row["n"] for row in rows} == {5}


def test_a_threshold_is_not_tried_on_prompts_that_it_was_chosen_on():
    # All rows of a prompt have a margin of its own size, whose verdict a threshold can only know from that prompt.
    golds, prompts = [[0.5, 0.5]] * 10 + [[1, 0]] * 10, ["a"] * 10 + ["b"] * 10
    scores = np.concatenate([np.tile([2.0, 0.0], 10), np.tile([1.0, 0.0], 10)])
    found = means(official_rows(asked(golds, "auto_j", prompt=prompts), Scores(scores)))
    assert found["agreement on three verdicts"] == 0.0
    assert official_rows(asked(golds[:10], "auto_j", prompt=prompts[:10]), Scores(scores[:20])) == []


def test_files_in_which_all_completions_tie():
    given = asked([[1, 1, 1]] * 4)
    found = means(measure(given, Scores(np.arange(12.0))).rows)
    assert found["gold of the pick by score"] == 1.0 and "best found" not in found
    assert means(baselines(given)) == pytest.approx(
        {
            "gold of a random pick": 1.0,
            "gold of the longest": 1.0,
            "gold of the best": 1.0,
            "gold gained by the longest over a random pick": 0.0,
            "gold gained by the best over a random pick": 0.0,
        }
    )
    nobody = asked([[1, 0]] * 4, "pandalm", votes=[(0, 1, 2)] * 4)
    assert official_rows(nobody, Scores(np.arange(8.0))) == []


def test_a_constant_scorer_has_ties_only():
    given = asked([[1, 0, 0]] * 5)
    found = means(measure(given, Scores(np.zeros(15))).rows)
    assert found["accuracy"] == 0.5 and found["accuracy, ties wrong"] == 0.0
    assert found["best found"] == pytest.approx(1 / 3) and found["best found, ties wrong"] == 0.0


def test_gold_itself_and_its_opposite():
    given, _ = random_sheet()
    best, worst = (measure(given, Scores(sign * given.gold)) for sign in (1.0, -1.0))
    assert means(best.rows)["accuracy"] == 1.0 and means(worst.rows)["accuracy"] == 0.0
    oracle = means(best.rows)["gold of the best"]
    assert means(best.rows)["gold of the pick by score"] == oracle
    assert best.best_of_n[-1, 1] == pytest.approx(oracle - given.gold.mean())
    assert best.best_of_n[:, 0].tolist() == [1, 2, 3, 4]
    assert best.best_of_n[0].tolist() == worst.best_of_n[0].tolist() == [1.0, 0.0, 0.0, 0.0]  # itself a random pick
    assert means(baselines(given))["gold gained by the best over a random pick"] == pytest.approx(best.best_of_n[-1, 1])
    assert (np.diff(best.best_of_n[:, 1]) > 0).all() and (np.diff(worst.best_of_n[:, 1]) < 0).all()


def test_increasing_transforms_leave_ranks_and_change_calibration():
    given, scores = random_sheet()
    plain, scaled = (means(measure(given, Scores(part)).rows) for part in (scores.mean, 3.0 * scores.mean + 2.0))
    for name in ("accuracy", "best found", "gold of the pick by score", f"{TRIVIAL}: AUROC of errors"):
        assert plain[name] == pytest.approx(scaled[name], nan_ok=True)
    assert plain["ECE"] != pytest.approx(scaled["ECE"])


def test_uncertainties():
    given, scores = random_sheet()
    found = deviations(given, scores)
    margins = scores.members[:, given.better] - scores.members[:, given.worse]
    np.testing.assert_allclose(found["epistemic"], margins.std(axis=0))
    np.testing.assert_allclose(
        found["aleatoric"], np.hypot(scores.aleatoric[given.better], scores.aleatoric[given.worse])
    )
    alone = deviations(given, Scores(scores.mean, scores.epistemic))
    np.testing.assert_allclose(
        alone["epistemic"], np.hypot(scores.epistemic[given.better], scores.epistemic[given.worse])
    )
    assert set(uncertainties(given, Scores(scores.mean))) == {TRIVIAL}
    # One head with a posterior: what the features of both completions share cancels in a margin.
    whitened = np.random.default_rng(1).normal(size=(5, given.gold.size)).astype(np.float32) + np.float32(9.0)
    exact = deviations(given, Scores(scores.mean, np.linalg.norm(whitened, axis=0), whitened=whitened))["epistemic"]
    for place, (better, worse) in enumerate(zip(given.better, given.worse, strict=True)):
        assert exact[place] == pytest.approx(np.sqrt(((whitened[:, better] - whitened[:, worse]) ** 2).sum()), rel=1e-5)
    assert exact.max() < np.linalg.norm(whitened, axis=0).min()
    # A constant that a member adds to all of its scores is not disagreement.
    moved = Scores(scores.mean, members=scores.members + np.array([[0.0], [5.0], [-7.0]]))
    np.testing.assert_allclose(deviations(given, moved)["epistemic"], found["epistemic"])


def test_an_uncertainty_is_also_weighed_against_the_margin():
    given, scores = random_sheet()
    found, sd = uncertainties(given, scores), deviations(given, scores)
    assert set(found) == {TRIVIAL, *sd, *(f"{WRONG_SIGN}{name}" for name in sd)}
    margin = scores.mean[given.better] - scores.mean[given.worse]
    rows = means(measure(given, scores).rows)
    for name, one in sd.items():
        weighed = error_auroc(margin > 0, one / np.abs(margin))  # of the same order
        assert rows[f"{WRONG_SIGN}{name}: AUROC of errors"] == pytest.approx(weighed)
        for kind in (name, f"{WRONG_SIGN}{name}"):
            over = rows[f"{kind}: AUROC of errors"] - rows[f"{TRIVIAL}: AUROC of errors"]
            assert rows[f"{kind}: AUROC of errors over {TRIVIAL}"] == pytest.approx(over)
    assert f"{TRIVIAL}: AUROC of errors over {TRIVIAL}" not in rows


def test_calibration_is_that_of_the_probability_that_a_model_states():
    given, answered = random_sheet()
    margin, sd = answered.mean[given.better] - answered.mean[given.worse], deviations(given, answered)
    stated = {name: 1.0 / (1.0 + np.exp(-one)) for name, one in stated_log_odds(given, answered).items()}
    np.testing.assert_allclose(stated.pop(""), 1.0 / (1.0 + np.exp(-margin)))
    assert set(stated) == {"margins moderated by epistemic", "margins moderated by aleatoric"}
    # Of ratings: a Gaussian's, which does not know their unit; other uncertainty adds to its variance.
    rated = dataclasses.replace(answered, states="ratings")
    stated = {name: 1.0 / (1.0 + np.exp(-one)) for name, one in stated_log_odds(given, rated).items()}
    np.testing.assert_allclose(stated.pop(""), norm.cdf(margin / sd["aleatoric"]))
    ((name, wider),) = stated.items()
    assert name == "epistemic variance added"
    np.testing.assert_allclose(wider, norm.cdf(margin / np.hypot(sd["aleatoric"], sd["epistemic"])))
    stars, points = (
        means(measure(given, Scores(unit * rated.mean, aleatoric=unit * rated.aleatoric, states="ratings")).rows)
        for unit in (1.0, 20.0)
    )
    assert stars["ECE"] == pytest.approx(points["ECE"])
    assert not any("moderated" in name for name in stars)


def test_without_a_probability_there_is_no_calibration():
    given, answered = random_sheet()
    battles = [{"model_a": f"m{i % 3}", "model_b": f"m{(i + 1) % 3}"} for i in range(12)]
    people = asked([[1, 0], [0, 1], [1, 0]] * 4, "ppe_human", extra=battles)
    for silent in (dataclasses.replace(answered, states=None), Scores(answered.mean, states="ratings")):
        found = measure(given, silent)
        assert found.reliability is None and "accuracy" in means(found.rows)
        assert not {name for name in means(found.rows) if name.startswith(("ECE", "ACE", "MCE"))}
        rows = means(official_rows(people, Scores(answered.mean[:24], states=silent.states)))
        assert "PPE: 1 pairwise accuracy" in rows and "PPE: pair-level ECE" not in rows
    assert "PPE: pair-level ECE" in means(official_rows(people, Scores(answered.mean[:24])))


def test_slices_of_enough_rows():
    names = ["a"] * 12 + ["b"] * 10 + ["c"] * 3
    given = asked([[1, 0]] * 25, slices=[{"subset": name, "all": "one"} for name in names])
    scores = np.tile([1.0, 0.0], 25)
    scores[:12] = 0.5  # six of the twelve pairs of a are ties
    found = measure(given, Scores(scores))
    assert list(found.slices) == ["subset"]
    assert [(row["name"], row["mean"], row["n"]) for row in found.slices["subset"]] == [("a", 0.75, 12), ("b", 1.0, 10)]
    assert means(found.rows)["accuracy, subset = a"] == 0.75
    # Rows of one prompt are one: the interval of twelve rows of three prompts says nothing.
    few = asked(
        [[1, 0]] * 25,
        slices=[{"subset": name} for name in names],
        prompt=[f"{i % 3 if i < 12 else i}" for i in range(25)],
    )
    assert measure(few, Scores(scores)).slices == {}


def test_the_largest_error_of_a_bin_has_no_interval():
    rows = {row["name"]: row for row in measure(*random_sheet()).rows}
    for suffix in ("", ", margins moderated by epistemic"):
        assert rows[f"MCE{suffix}"]["ci95"] == [None, None] and rows[f"MCE{suffix}"]["mean"] > 0.0
        assert rows[f"ECE{suffix}"]["ci95"][0] <= rows[f"ECE{suffix}"]["ci95"][1]


def test_differences_and_new_data():
    given, scores = random_sheet()
    better = Scores(given.gold)
    gained = means(compare_rows(given, better, scores))["accuracy gained"]
    assert gained == pytest.approx(1.0 - means(measure(given, scores).rows)["accuracy"])
    surer = Scores(scores.mean, scores.epistemic + 100.0, None, scores.members)
    found = means(new_data_rows((given, scores), (given, surer)))
    assert found["epistemic: AUROC out of distribution"] == 1.0
    assert found[f"{TRIVIAL}: AUROC out of distribution"] == 0.5
    assert not any(name.startswith("aleatoric") for name in found)


def test_mismatch_over_models():
    given, _ = random_sheet(rows=30)
    noise = np.random.default_rng(1).normal(size=given.gold.size)
    several = [measure(given, Scores(given.gold + size * noise)) for size in (0.1, 1.0, 3.0, 30.0)]
    rows = mismatch_rows({"file": several})
    found = means(rows)
    assert all(row["ci95"] == [None, None] and row["n"] == 4 for row in rows)  # of four models it would be chance
    more = mismatch_rows({"file": [*several, measure(given, Scores(noise))]})
    assert all(row["n"] == 5 and None not in row["ci95"] for row in more)
    assert found["Spearman, reward model accuracy on file ~ evaluation gold of best of n on file"] == pytest.approx(1.0)
    assert mismatch_rows({"file": several[:2]}) == []


def test_official_numbers():
    pair = [[1, 0]] * 4
    right = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])  # the last pair is a tie, which is wrong
    sections = [
        {"subset": name, "section": part} for name, part in (("hep-go", "r"), ("hep-go", "r"), *[("x", "c")] * 2)
    ]
    assert means(official_rows(asked(pair, "reward_bench", sections), Scores(right)))["RewardBench c"] == 0.5
    leaves = [{"subset": "Help", "category": name} for name in "aabb"]
    assert means(official_rows(asked(pair, "rmb_pairwise", leaves), Scores(right)))["RMB: Help, pairs"] == 0.75
    best = asked([[0, 0, 1]] * 2, "rmb_best_of_n", leaves[1:3])
    found = means(official_rows(best, Scores(np.array([0.0, 0.0, 1.0, 0.0, 2.0, 1.0]))))
    assert found["RMB: Help, best of n"] == 0.5
    styles = asked([[1, 1, 1, 0, 0, 0]], "rm_bench", [{"domain": "chat"}])
    found = means(official_rows(styles, Scores(np.array([0.0, 1.0, 2.0, 0.5, 0.5, 0.5]))))
    assert [found[f"RM-Bench {name}, mean over all"] for name in ("easy", "normal", "hard")] == [
        1.0,
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    ]
    two = asked([[1, 0, 0, 0]] * 2, "reward_bench_2", [{"subset": "Math"}] * 2, extra=[{"id": "1"}, {"id": "2"}])
    assert means(official_rows(two, Scores(np.array([2.0, 0, 0, 0, 0, 1, 0, 0]))))["RewardBench 2 Math"] == 0.5
    alone = asked(
        [[1, 0, 0, 0]] * 2, "reward_bench_2", [{"subset": "Ties"}] * 2, extra=[{"id": "ref:1"}, {"id": "ref:2"}]
    )
    assert official_rows(alone, Scores(np.zeros(8))) == []  # a reference without its tied prompt
    nameless = asked([[1, 0, 0, 0]], "reward_bench_2", [{"subset": "Ties"}], extra=[{"id": ""}])
    assert official_rows(nameless, Scores(np.zeros(4))) == []
    correct = asked([[1, 0, 1, 0]] * 3, "ppe_correctness")
    found = means(official_rows(correct, Scores(np.tile([3.0, 0.0, 2.0, 1.0], 3))))
    assert found["PPE: 8 accuracy on conflict pairs"] == found["PPE: 9 ROC-AUC"] == 1.0
    assert official_rows(asked(pair, "llmbar"), Scores(right)) == []


def test_the_score_of_rmb_is_over_all_of_its_files():
    """Leaf means: Help by pairs 1 and 0, Harm by pairs 1, Help by lists ½; the file of another format has no part."""
    first = asked([[1, 0]] * 3, "rmb_pairwise", [{"subset": "Help", "category": leaf} for leaf in "aab"])
    second = asked([[1, 0]] * 2, "rmb_pairwise", [{"subset": "Harm", "category": "S1"}] * 2)
    lists = asked([[1, 0, 0]] * 2, "rmb_best_of_n", [{"subset": "Help", "category": "a"}] * 2)
    right, wrong = [1.0, 0.0], [0.0, 0.0]
    answers = [right + right + wrong, right + right, [1.0, 0.0, 0.5, 1.0, 0.0, 1.0]]
    answers = [Scores(np.array(one)) for one in answers]
    other, nothing = asked([[1, 0]], "llmbar"), Scores(np.array([1.0, 0.0]))
    rows = rmb_score_rows([first, lists, other, second], [answers[0], answers[2], nothing, answers[1]])
    assert means(rows) == pytest.approx(
        {
            "RMB: Help, pairs": 0.5,
            "RMB: Harm, pairs": 1.0,
            "RMB: Help, best of n": 0.5,
            "RMB, mean of the 3 of four that are there": 2.0 / 3,
            "RMB, mean over all": 5.0 / 7,
        }
    )
    assert {row["n"] for row in rows} == {3}  # the prompts are called alike in all files
    harm = asked([[1, 0, 0]], "rmb_best_of_n", [{"subset": "Harm", "category": "S1"}])
    whole = rmb_score_rows([first, second, lists, harm], [*answers, Scores(np.array([1.0, 0.0, 0.0]))])
    assert means(whole)["RMB score, mean of the four"] == pytest.approx((0.5 + 1.0 + 0.5 + 1.0) / 4)
    assert rmb_score_rows([first, other], [answers[0], nothing]) == []


def test_baselines():
    given = asked([[1, 0], [0, 1], [0, 1], [0.5, 0.5]], lengths=np.array([3.0, 1.0, 2.0, 2.0, 4.0, 1.0, 1.0, 1.0]))
    assert means(baselines(given)) == pytest.approx(
        {
            "accuracy of the longer completion": 0.5,
            "accuracy of the first position": 1 / 3,
            "accuracy of chance": 0.5,
        }
    )
    assert all(len(row["ci95"]) == 2 for row in baselines(given))
    # Where no pair has the better one second, that is how the file is written, and no baseline.
    assert "accuracy of the first position" not in means(baselines(asked([[1, 0]] * 3)))


def test_three_verdicts():
    # The margin of a tie is small: a threshold found on the other rows tells them apart.
    golds = [[1, 0], [0.5, 0.5], [0, 1], [0.5, 0.5]] * 5
    scores = np.concatenate([[2.0, 0.0], [0.1, 0.0], [0.0, 3.0], [0.0, 0.05]] * 5).astype(float)
    assert means(official_rows(asked(golds, "auto_j"), Scores(scores)))["agreement on three verdicts"] == 1.0
    votes = [(1, 1, 2), (0, 0, 0), (2, 2, 2), (0, 1, 2)] * 5  # the last has no majority and is left out
    found = official_rows(asked(golds, "pandalm", votes=votes), Scores(scores))
    assert found[0]["n"] == 15 and found[0]["mean"] == 1.0


def test_models_without_a_probability_are_named():
    given, answered = random_sheet()
    models = {"sure": answered, "mixed": dataclasses.replace(answered, states=None)}
    measured = {name: measure(given, one) for name, one in models.items()}
    file = FileReport("graded", "choices", 12, 12, measured, [], {})
    assert uncalibrated([file, file]) == "Without calibration, as no probability is stated: mixed."
    assert uncalibrated([dataclasses.replace(file, models={"sure": measured["sure"]})]) == ""
    assert [line.cells[1] is None for line in lines_of(file)] == [False, True]


class Checker(HTMLParser):
    """Collects what a document loads, and its cells."""

    def __init__(self):
        super().__init__()
        self.sources, self.cells = [], 0

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "srcset", "href")]
        self.cells += tag == "td"


TITLES = ("accuracy of the surest pairs", "best of n")


def test_the_page_is_one_file(tmp_path, capsys, monkeypatch):
    given, scores = random_sheet()
    several = {"first <b>": measure(given, scores), "second": measure(given, Scores(given.gold))}
    pairs = asked([[1, 0]] * 22, slices=[{"subset": name} for name in ["a"] * 11 + ["b"] * 11])
    more = {name: measure(pairs, Scores(np.tile([1.0, 0.0], 22))) for name in several}
    compared = {"second": compare_rows(given, Scores(given.gold), scores)}
    files = [
        FileReport("graded & good", "choices", 12, 12, several, baselines(given), compared),
        FileReport("pairs", "preference", 30, 22, more, baselines(pairs), {}),
    ]
    first, second, *trivial = lines_of(files[0])
    assert [line.name for line in trivial] == ["longer completion", "first position", "chance", "best there is"]
    rows = means(several["first <b>"].rows)
    best = max(rows[f"{name}: AUROC of errors"] for name in uncertainties(given, scores))
    wanted = rows["accuracy"], rows["ECE"], best, rows["gold gained over a random pick"]
    assert tuple(cell["mean"] for cell in first.cells) == wanted and rows[f"{first.by}: AUROC of errors"] == best
    assert second.by == "" and second.cells[2] is None  # all are right: there are no errors to find
    assert [line.name for line in lines_of(files[1])][2:] == ["longer completion", "chance"]
    print_overview(files, [{"name": "RMB score", "mean": 0.5, "ci95": [0.25, 0.75]}])
    printed = capsys.readouterr().out.splitlines()
    assert printed.pop() == "RMB score: 0.500 [0.250, 0.750]"
    assert 12 <= len(printed) <= 20 and f"{rows['accuracy']:.3f} [" in printed[4]
    page = report_html(files, {"new data": baselines(given)}, {"device": "cpu"})
    checker = Checker()
    checker.feed(page)
    assert len(checker.sources) == 2 and all(one.startswith("data:image/png;base64,") for one in checker.sources)
    light, dark = (base64.b64decode(one.partition(",")[2]) for one in sorted(checker.sources))
    assert light.startswith(b"\x89PNG") and dark.startswith(b"\x89PNG") and light != dark
    assert "first &lt;b&gt;" in page and "graded &amp; good" in page and "22 of 30 rows" in page
    assert "prefers-color-scheme: dark" in page and "http" not in re.sub("base64,[^']*", "", page)
    # The best model of each file is marked, those that tie alike.
    assert page.count("class=best") == 1 + 2
    assert checker.cells > 100
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(model_report, "save", lambda figure, path: figures.append(figure))
        report_figure(files, tmp_path / "report.png")
    panels = {title: [one for one in figures[0].axes if one.get_title(loc="left") == title] for title in TITLES}
    surest, best = panels["accuracy of the surest pairs"], panels["best of n"]
    assert len(surest) == 2 and surest[0].get_ylim() == surest[1].get_ylim()
    assert all(any(set(line.get_ydata()) == {0.5} for line in one.lines) for one in surest)  # chance
    assert surest[0].get_ylim()[0] < 0.5 and surest[0].get_ylim()[1] > 1.0
    slices = [one for one in figures[0].axes if one.get_title(loc="left").endswith("rows)")]
    assert len(slices) == 2 and slices[0].get_xlim() == slices[1].get_xlim()
    # Of two models each has its own interval, at the end of its own line, and no band lies on another.
    assert len(best) == 1 and not best[0].collections
    report_figure(files[1:], tmp_path / "figures" / "report.png")
    assert (tmp_path / "figures" / "report.png").read_bytes().startswith(b"\x89PNG")
