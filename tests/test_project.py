"""What holds of the project as a whole: its metadata, its licence, what its core needs, and how long its files are."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import rlhf_jax

REPOSITORY = Path(__file__).resolve().parent.parent
CORE = ["models", "sampling", "losses", "rewards", "algorithms"]

# Imports every module of the packages named while an import *by rlhf_jax* of any but the few allowed libraries fails,
# as it would where only those are installed. What the allowed libraries import for themselves is their own matter.
PROGRAM = """
import builtins, importlib, pkgutil, sys

ALLOWED = {"jax", "flax", "optax", "chex", "einops", "jaxtyping", "numpy", "scipy", "rlhf_jax"}
ALLOWED |= sys.stdlib_module_names
real_import = builtins.__import__

def guarded_import(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if level == 0 and importer.partition(".")[0] == "rlhf_jax" and name.partition(".")[0] not in ALLOWED:
        raise ImportError(f"{importer} imports {name}, which the core does without")
    return real_import(name, globals, locals, fromlist, level)

builtins.__import__ = guarded_import
for name in sys.argv[1:]:
    package = importlib.import_module("rlhf_jax." + name)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
"""


def sources(folder):
    return sorted((REPOSITORY / folder).rglob("*.py"))


def test_the_installed_package_has_the_version_and_licence_of_the_source():
    metadata = importlib.metadata.metadata("rlhf_jax")
    assert metadata["Version"] == rlhf_jax.__version__
    assert "Apache-2.0" in (metadata["License"] or metadata["License-Expression"])
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Version 2.0, January 2004" in (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert f"version: {rlhf_jax.__version__}" in (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {rlhf_jax.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_core_imports_with_few_libraries():
    result = subprocess.run([sys.executable, "-c", PROGRAM, *CORE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr.strip().splitlines()[-1]
    assert {module.split(".")[1] for module in result.stdout.split()} == set(CORE)


def test_the_import_guard_sees_a_library_that_the_core_does_without():
    """The guard of the test above is no formality: `training`, which is not core, does not pass it."""
    result = subprocess.run([sys.executable, "-c", PROGRAM, "training"], capture_output=True, text=True, check=False)
    assert "rlhf_jax.training.progress imports rich" in result.stderr


def test_a_file_stays_short_enough_to_read():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in sources("rlhf_jax")}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_nothing_is_left_to_do_in_the_code():
    marks = ["TO" + "DO", "FIX" + "ME"]
    files = sources("rlhf_jax") + sources("experiments") + sources("tests")
    assert [path for path in files if any(mark in path.read_text(encoding="utf-8") for mark in marks)] == []
