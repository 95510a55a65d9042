"""A run of one process or of one of two, on eight devices in all: `python toy_run.py FOLDER PROCESSES PROCESS_ID PORT`.

It waits before step 6 until the file FOLDER/go is there, and prints its last state.
"""

import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.parallel.distributed import Distributed, initialise
from rlhf_jax.parallel.meetings import gathered
from rlhf_jax.training.checkpoints import shapes_of
from rlhf_jax.training.loop import Cadence, run_steps
from rlhf_jax.training.resume import newest, open_checkpoints
from rlhf_jax.training.sinks import Sinks

STEPS, WAITS_BEFORE = 40, 6


class Counting:
    """Batches 1, 2, 3, …"""

    def __init__(self, folder: Path):
        self.number, self.folder = 0, folder

    def __next__(self):
        self.number += 1
        while self.number == WAITS_BEFORE and not (self.folder / "go").exists():
            time.sleep(0.05)
        time.sleep(0.05)  # a signal takes a while from one process to the other
        return np.float32(self.number)

    def get_state(self):
        return {"number": self.number}


def begin():
    return {"weights": jnp.arange(16.0), "step": jnp.int32(0), "key": jax.random.key(1)}


@partial(jax.jit, donate_argnums=0)
def step(state, batch):
    key, now = jax.random.split(state["key"])
    weights = state["weights"] + batch * jax.random.uniform(now, (16,))
    return {"weights": weights, "step": state["step"] + 1, "key": key}, {"loss/policy": weights[0]}


def main(folder: Path, processes: int, process_id: int, port: int):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    initialise(Distributed(f"127.0.0.1:{port}" if processes > 1 else None, processes, process_id))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    places = {"weights": PartitionSpec("data"), "step": PartitionSpec(), "key": PartitionSpec()}
    state = jax.jit(begin, out_shardings={name: NamedSharding(mesh, spec) for name, spec in places.items()})()
    batches, start = Counting(folder), 0
    found = newest(folder / "checkpoints", shapes_of(state))
    if found is not None:
        state, start, batches.number = found.state, found.step, found.data["number"]
    (folder / f"ready_{process_id}").touch()
    with open_checkpoints(folder / "checkpoints") as save:
        trained = run_steps(step, state, batches, Cadence(STEPS, save_every=4), save, Sinks(), start)
    print("weights", gathered(trained.state)["weights"].tobytes().hex())


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
