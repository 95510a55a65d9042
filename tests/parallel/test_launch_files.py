"""The files of docs/launch, run with stand-ins for the clusters: they start the script with options that it takes."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from rlhf_jax.training.command_line import parse
from rlhf_jax.training.options import TrainingOptions

LAUNCH = Path(__file__).resolve().parents[2] / "docs" / "launch"

# Stands in for Python: writes down its options, and waits for SIGTERM where it is told to. No $( ) in that loop: a trap
# that runs while bash reads one is itself read as its text, and the signal is lost.
PYTHON = """#!/bin/bash
shift
printf '%s\\n' "$@" > "$OUT/words"
trap 'echo stopped; exit 0' TERM
if [ -f "$OUT/wait" ]; then touch "$OUT/waits"; while true; do sleep 0.05; done; fi
touch "$OUT/summary.json"
"""
# SLURM starts the command behind its own options, gcloud the text behind --command.
SRUN = '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'
GCLOUD = '#!/bin/bash\nfor word; do if [[ "$word" == --command=* ]]; then exec bash -c "${word#--command=}"; fi; done\n'


def of_jobset() -> dict:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def of_pod() -> str:
    pod = of_jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return pod["containers"][0]["args"][0]


def of_skypilot(part: str) -> str:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())[part]


PROGRAMS = {
    "slurm.sh": lambda: (LAUNCH / "slurm.sh").read_text(),
    "tpu_pod.sh": lambda: (LAUNCH / "tpu_pod.sh").read_text(),
    "jobset.yaml": of_pod,
    "skypilot.yaml": lambda: of_skypilot("run").replace("/runs/sft", "$OUT"),
}


@pytest.fixture
def cluster(tmp_path):
    """A folder with stand-ins, and the environment that the clusters give to a process."""
    stands_in = {".venv/bin/python": PYTHON, "python": PYTHON, "srun": SRUN, "gcloud": GCLOUD}
    stands_in["rlhf_jax/.venv/bin/python"] = PYTHON
    for name, text in stands_in.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(tmp_path), "MODEL": "m", "DATA": "d"}
    environment |= {"SLURM_CPUS_PER_TASK": "12", "JOB_COMPLETION_INDEX": "1", "TPU_NAME": "t", "ZONE": "z"}
    environment |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    return {"cwd": tmp_path, "env": environment}


def options_given(name: str, cluster: dict) -> TrainingOptions:
    subprocess.run(["bash", "-c", PROGRAMS[name](), name, "run"], check=True, timeout=20, **cluster)
    words = (cluster["cwd"] / "words").read_text().splitlines()
    return parse({"default": TrainingOptions()}, "", words)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_script_gets_options_that_it_takes_and_goes_on_with_a_run(name, cluster):
    given = options_given(name, cluster)
    assert given.out == cluster["cwd"] and given.mesh == "data=2,fsdp=8" and not given.resume
    who = (given.coordinator, given.processes, given.process_id)
    found_out = (None, None, None)
    addresses = {"jobset.yaml": ("sft-hosts-0-0.sft:8476", 2, 1), "skypilot.yaml": ("10.0.0.1:8476", 2, 1)}
    assert who == addresses.get(name, found_out)
    (cluster["cwd"] / "config.json").touch()
    assert options_given(name, cluster).resume


def test_the_other_programs_can_be_read():
    for program in (of_skypilot("setup"), (LAUNCH / "tpu_pod.sh").read_text()):
        subprocess.run(["bash", "-n"], input=program, text=True, check=True)
    script = ["bash", str(LAUNCH / "tpu_pod.sh")]
    found = subprocess.run(script, env=os.environ | {"TPU_NAME": "t", "ZONE": "z"}, capture_output=True, text=True)
    assert found.returncode == 2 and "usage" in found.stderr


def test_the_pods_find_one_another():
    jobset = of_jobset()
    name, group = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]
    job = group["template"]["spec"]
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["network"]["enableDNSHostnames"] and job["completionMode"] == "Indexed"
    assert f"--coordinator {name}-{group['name']}-0-0.{name}:" in of_pod()
    assert f"--processes {job['completions']} " in of_pod() and job["parallelism"] == job["completions"]


def test_a_pod_passes_sigterm_on_and_fails_unless_the_run_is_finished(cluster):
    (cluster["cwd"] / "wait").touch()
    running = subprocess.Popen(["bash", "-c", of_pod()], stdout=subprocess.PIPE, text=True, **cluster)
    while not (cluster["cwd"] / "waits").exists():
        assert running.poll() is None
    running.terminate()
    assert running.communicate(timeout=10)[0] == "stopped\n" and running.returncode == 1
