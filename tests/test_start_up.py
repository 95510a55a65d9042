"""What a script imports before it does anything: slow libraries are left for the functions that use them."""

import json
import subprocess
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
SLOW = [
    *("array_record", "datasets", "grain", "huggingface_hub", "jinja2", "matplotlib", "orbax", "pandas", "psutil"),
    *("safetensors", "scipy.stats", "tensorboardX", "tensorflow_datasets", "tensorstore", "tokenizers", "torch"),
    *("transformers", "tyro", "wandb"),
]

# Runs files as imports of them would, in one process, and says which slow libraries each was the first to load.
PROGRAM = """
import json, runpy, sys

slow, *files = json.loads(sys.argv[1])
found, before = {}, set()
for file in files:
    runpy.run_path(file, run_name="imported")
    loaded = {name for name in slow if name in sys.modules}
    found[file] = sorted(loaded - before)
    before |= loaded
print(json.dumps(found))
"""


def loaded_by(files: list[Path], slow: list[str] = SLOW) -> dict[str, list[str]]:
    """Names of the slow libraries that each file is the first to load, of those that load any."""
    words = json.dumps([slow, *map(str, files)])
    command = [sys.executable, "-c", PROGRAM, words]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return {Path(file).name: names for file, names in json.loads(result.stdout).items() if names}


def test_no_script_loads_a_slow_library_before_it_needs_it():
    scripts = sorted(EXPERIMENTS.glob("*.py"))
    assert len(scripts) > 20
    assert loaded_by(scripts) == {}


def test_a_slow_import_is_found_and_the_package_alone_loads_nothing(tmp_path):
    (tmp_path / "package.py").write_text("import rlhf_jax\n")
    (tmp_path / "special.py").write_text("from scipy import special\n")
    (tmp_path / "stats.py").write_text("from scipy import stats\n")
    files = [tmp_path / name for name in ("package.py", "special.py", "stats.py")]
    assert loaded_by(files, ["jax", "numpy", "scipy.special", "scipy.stats"]) == {
        "special.py": ["numpy", "scipy.special"],
        "stats.py": ["scipy.stats"],
    }
