"""What is measured of models on judged rows, against plain loops; and the page that shows it."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rlhf_jax.data.judged import JudgedRow
from rlhf_jax.evaluation import statistics
from rlhf_jax.evaluation.model_measures import baselines, compare_rows, measure, mismatch_rows, new_data_rows
from rlhf_jax.evaluation.model_report import FileReport, report_figure, report_html
from rlhf_jax.evaluation.official_scores import official_rows
from rlhf_jax.evaluation.sheets import MOST_PAIRS, TRIVIAL, Scores, sheet, uncertainties
from rlhf_jax.training import held_out


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """Intervals of 20 draws: their own tests look at them, here it is the numbers that count."""
    bootstrap = statistics.bootstrap

    def few(*arguments, n, **options):
        return bootstrap(*arguments, n=min(n, 20), **options)

    monkeypatch.setattr(statistics, "bootstrap", few)
    monkeypatch.setattr(held_out, "bootstrap", few)


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
    for format in ("reward_bench", "rmb_pairwise", "auto_j"):
        known = official_rows(asked([[1, 0]] * 40, format, subsets, prompt=prompts), scores)
        assert known and {row["n"] for row in known} == {5}
    several = asked([[1, 0, 0]] * 40, "rmb_best_of_n", subsets, prompt=prompts)
    rows = baselines(several) + official_rows(several, np.arange(120.0) % 7)
    assert {row["n"] for row in rows} == {5}


def test_a_threshold_is_not_tried_on_prompts_that_it_was_chosen_on():
    # All rows of a prompt have a margin of its own size, whose verdict a threshold can only know from that prompt.
    golds, prompts = [[0.5, 0.5]] * 10 + [[1, 0]] * 10, ["a"] * 10 + ["b"] * 10
    scores = np.concatenate([np.tile([2.0, 0.0], 10), np.tile([1.0, 0.0], 10)])
    found = means(official_rows(asked(golds, "auto_j", prompt=prompts), scores))
    assert found["agreement on three verdicts"] == 0.0
    assert official_rows(asked(golds[:10], "auto_j", prompt=prompts[:10]), scores[:20]) == []


def test_files_in_which_all_completions_tie():
    given = asked([[1, 1, 1]] * 4)
    found = means(measure(given, Scores(np.arange(12.0))).rows)
    assert found["gold of the pick by score"] == 1.0 and "best found" not in found
    assert baselines(given) == []
    nobody = asked([[1, 0]] * 4, "pandalm", votes=[(0, 1, 2)] * 4)
    assert official_rows(nobody, np.arange(8.0)) == []


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
    assert best.best_of_n[-1, 1] == pytest.approx(oracle) and best.best_of_n[:, 0].tolist() == [1, 2, 3, 4]
    assert best.best_of_n[0, 1] == pytest.approx(given.gold.mean()) == pytest.approx(worst.best_of_n[0, 1])
    assert (np.diff(best.best_of_n[:, 1]) > 0).all() and (np.diff(worst.best_of_n[:, 1]) < 0).all()


def test_increasing_transforms_leave_ranks_and_change_calibration():
    given, scores = random_sheet()
    plain, scaled = (means(measure(given, Scores(part)).rows) for part in (scores.mean, 3.0 * scores.mean + 2.0))
    for name in ("accuracy", "best found", "gold of the pick by score", f"{TRIVIAL}: AUROC of errors"):
        assert plain[name] == pytest.approx(scaled[name], nan_ok=True)
    assert plain["ECE"] != pytest.approx(scaled["ECE"])


def test_uncertainties():
    given, scores = random_sheet()
    found = uncertainties(given, scores)
    margins = scores.members[:, given.better] - scores.members[:, given.worse]
    np.testing.assert_allclose(found["epistemic"], margins.std(axis=0))
    np.testing.assert_allclose(
        found["aleatoric"], np.hypot(scores.aleatoric[given.better], scores.aleatoric[given.worse])
    )
    alone = uncertainties(given, Scores(scores.mean, scores.epistemic))
    np.testing.assert_allclose(
        alone["epistemic"], np.hypot(scores.epistemic[given.better], scores.epistemic[given.worse])
    )
    assert set(uncertainties(given, Scores(scores.mean))) == {TRIVIAL}
    # A constant that a member adds to all of its scores is not disagreement.
    moved = Scores(scores.mean, members=scores.members + np.array([[0.0], [5.0], [-7.0]]))
    np.testing.assert_allclose(uncertainties(given, moved)["epistemic"], found["epistemic"])


def test_slices_of_enough_rows():
    names = ["a"] * 12 + ["b"] * 10 + ["c"] * 3
    given = asked([[1, 0]] * 25, slices=[{"subset": name, "all": "one"} for name in names])
    scores = np.tile([1.0, 0.0], 25)
    scores[:12] = 0.5  # six of the twelve pairs of a are ties
    found = measure(given, Scores(scores))
    assert list(found.slices) == ["subset"]
    assert [(row["name"], row["mean"], row["n"]) for row in found.slices["subset"]] == [("a", 0.75, 12), ("b", 1.0, 10)]
    assert means(found.rows)["accuracy, subset = a"] == 0.75


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
    found = means(mismatch_rows({"file": several}))
    assert found["Spearman, reward model accuracy on file ~ evaluation gold of best of n on file"] == pytest.approx(1.0)
    assert mismatch_rows({"file": several[:2]}) == []


def test_official_numbers():
    pair = [[1, 0]] * 4
    right = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])  # the last pair is a tie, which is wrong
    sections = [
        {"subset": name, "section": part} for name, part in (("hep-go", "r"), ("hep-go", "r"), *[("x", "c")] * 2)
    ]
    assert means(official_rows(asked(pair, "reward_bench", sections), right))["RewardBench c"] == 0.5
    leaves = [{"subset": "Help", "category": name} for name in "aabb"]
    assert means(official_rows(asked(pair, "rmb_pairwise", leaves), right))["RMB: Help, pairs"] == 0.75
    best = asked([[0, 0, 1]] * 2, "rmb_best_of_n", leaves[1:3])
    found = means(official_rows(best, np.array([0.0, 0.0, 1.0, 0.0, 2.0, 1.0])))
    assert found["RMB: Help, best of n"] == 0.5
    styles = asked([[1, 1, 1, 0, 0, 0]], "rm_bench", [{"domain": "chat"}])
    found = means(official_rows(styles, np.array([0.0, 1.0, 2.0, 0.5, 0.5, 0.5])))
    assert [found[f"RM-Bench {name}, mean over all"] for name in ("easy", "normal", "hard")] == [
        1.0,
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    ]
    two = asked([[1, 0, 0, 0]] * 2, "reward_bench_2", [{"subset": "Math"}] * 2, extra=[{"id": "1"}, {"id": "2"}])
    assert means(official_rows(two, np.array([2.0, 0, 0, 0, 0, 1, 0, 0])))["RewardBench 2 Math"] == 0.5
    alone = asked(
        [[1, 0, 0, 0]] * 2, "reward_bench_2", [{"subset": "Ties"}] * 2, extra=[{"id": "ref:1"}, {"id": "ref:2"}]
    )
    assert official_rows(alone, np.zeros(8)) == []  # a reference without its tied prompt
    nameless = asked([[1, 0, 0, 0]], "reward_bench_2", [{"subset": "Ties"}], extra=[{"id": ""}])
    assert official_rows(nameless, np.zeros(4)) == []
    correct = asked([[1, 0, 1, 0]] * 3, "ppe_correctness")
    found = means(official_rows(correct, np.tile([3.0, 0.0, 2.0, 1.0], 3)))
    assert found["PPE: 8 accuracy on conflict pairs"] == found["PPE: 9 ROC-AUC"] == 1.0
    assert official_rows(asked(pair, "llmbar"), right) == []


def test_three_verdicts():
    # The margin of a tie is small: a threshold found on the other rows tells them apart.
    golds = [[1, 0], [0.5, 0.5], [0, 1], [0.5, 0.5]] * 5
    scores = np.concatenate([[2.0, 0.0], [0.1, 0.0], [0.0, 3.0], [0.0, 0.05]] * 5).astype(float)
    assert means(official_rows(asked(golds, "auto_j"), scores))["agreement on three verdicts"] == 1.0
    votes = [(1, 1, 2), (0, 0, 0), (2, 2, 2), (0, 1, 2)] * 5  # the last has no majority and is left out
    found = official_rows(asked(golds, "pandalm", votes=votes), scores)
    assert found[0]["n"] == 15 and found[0]["mean"] == 1.0


class Checker(HTMLParser):
    """Collects what a document loads, and its cells."""

    def __init__(self):
        super().__init__()
        self.sources, self.cells = [], 0

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "srcset", "href")]
        self.cells += tag == "td"


def test_the_page_is_one_file(tmp_path):
    given, scores = random_sheet()
    several = {"first <b>": measure(given, scores), "second": measure(given, Scores(given.gold))}
    pairs = asked([[1, 0]] * 22, slices=[{"subset": name} for name in ["a"] * 11 + ["b"] * 11])
    more = {name: measure(pairs, Scores(np.tile([1.0, 0.0], 22))) for name in several}
    compared = {"second": compare_rows(given, Scores(given.gold), scores)}
    files = [
        FileReport("graded & good", "choices", 12, 12, several, baselines(given), compared),
        FileReport("pairs", "preference", 30, 22, more, baselines(pairs), {}),
    ]
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
    report_figure(files[1:], tmp_path / "figures" / "report.png")
    assert (tmp_path / "figures" / "report.png").read_bytes().startswith(b"\x89PNG")
    buffer = io.BytesIO()
    report_figure(files, buffer, dark=True)
    assert buffer.getvalue().startswith(b"\x89PNG")
