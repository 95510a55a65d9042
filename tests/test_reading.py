"""How much one must read to follow one step from prompt to update, apart from the transformer itself.

Counted are the files of `algorithms`, `losses` and `sampling` that an algorithm imports, and those that they import in
turn, each as a whole. Left out are `models` (the transformer, its heads and adapters), `rewards`, and `types`, which
holds records alone. Of a file, "code" are the lines that hold a token of the program; docstrings, comments and blank
lines come on top.
"""

import ast
import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rlhf_jax"
READ = ("algorithms", "losses", "sampling")
MOST = 1200


def files_read(start: Path) -> set[Path]:
    """The file, and those of the packages in `READ` that it imports, directly or not."""
    found, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_jax."):
                module = PACKAGE.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
                if module.is_file() and module.parent.name in READ:
                    waiting.append(module)
    return found


def code_lines(path: Path) -> int:
    """Lines that hold a token of the program: no docstring, no comment, not blank."""
    text = path.read_text(encoding="utf-8")
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


@pytest.mark.parametrize("algorithm", ["ppo", "policy_gradient"])
def test_one_step_from_prompt_to_update_is_short_enough_to_read(algorithm):
    files = files_read(PACKAGE / "algorithms" / f"{algorithm}.py")
    code = {path.relative_to(PACKAGE).as_posix(): code_lines(path) for path in files}
    assert {"algorithms/on_policy.py", "losses/policy.py", "sampling/generate.py"} <= set(code)
    assert sum(code.values()) <= MOST


def test_what_is_no_code_is_not_counted(tmp_path):
    path = tmp_path / "module.py"
    lines = ['"""Two', 'lines."""', "", "# a comment", "value = (", "    1  # one", ")", "def f():", '    """Doc."""']
    path.write_text("\n".join([*lines, '    return "text"', ""]))
    assert code_lines(path) == 5
