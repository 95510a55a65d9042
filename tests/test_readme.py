"""What the README says holds: its example runs, its links lead somewhere, and the failures it points to are tested."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "BUILD.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(REPOSITORY)) for page in PAGES]


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_example_of_the_readme_runs_and_the_reward_rises(capsys):
    (example,) = examples()
    assert len(example.splitlines()) <= 26
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    rewards = [float(number) for number in re.findall(r"reward ([0-9.]+)", printed)]
    assert len(rewards) == len(printed.splitlines()) == 20
    assert rewards[-1] > rewards[0] + 0.3


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_within_the_repository_lead_to_a_file_or_folder(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    inside = [link for link in links if "://" not in link]
    assert [link for link in inside if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_pages_name_no_folder_of_one_machine(page):
    assert re.findall(r"(?<![\w.])/(?:home|root|work|tmp|Users)\b\S*", page.read_text(encoding="utf-8")) == []


def test_every_regression_test_stands_on_the_scoreboard_under_its_file():
    listed, file = set(), None
    for name in re.findall(r"`(test_\w+(?:\.py)?)`", (REPOSITORY / "docs" / "scoreboard.md").read_text("utf-8")):
        if name.endswith(".py"):
            file = name
        else:
            listed.add((file, name))
    written = {
        (path.name, node.name)
        for path in (REPOSITORY / "tests" / "regressions").glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert listed == written
