import json
import logging
import resource
import shutil
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlhf_jax.training import checkpoints, resume, run_folder


def state(number):
    return {"weights": jnp.full(3, number, jnp.float32), "key": jax.random.key(number), "step": jnp.int32(number)}


def save_steps(folder, *numbers, best=None, metrics=lambda number: {}):
    with resume.open_checkpoints(folder, {"steps": 10}, best) as save:
        for number in numbers:
            save(number, state(number), {"batches": number}, metrics(number))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_two_are_kept_with_their_place_in_the_data_and_the_options(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        save_steps(tmp_path, 1, 2, 10)
    assert not caplog.records, "a user sees these"
    assert names(tmp_path) == ["step_00000002", "step_00000010"]
    found = resume.newest(tmp_path, state(0))
    assert (found.step, found.data) == (10, {"batches": 10})
    np.testing.assert_array_equal(found.state["weights"], np.full(3, 10.0, np.float32))
    assert jnp.all(jax.random.key_data(found.state["key"]) == jax.random.key_data(jax.random.key(10)))
    assert json.loads((tmp_path / "step_00000010" / "run" / "metadata").read_text())["config"] == {"steps": 10}


def test_no_checkpoint_yet(tmp_path):
    assert resume.newest(tmp_path / "checkpoints", state(0)) is None


@pytest.mark.parametrize(("words", "best"), [("min:eval/nll", 2), ("max:eval/nll", 4)])
def test_the_best_is_kept_beside_the_newest_two_also_by_a_resumed_run(tmp_path, words, best, caplog):
    nll = {1: 0.5, 2: 0.25, 3: float("nan"), 4: 0.75, 5: 0.5, 6: 0.5, 7: 0.5, 8: 0.5}
    save = partial(save_steps, tmp_path, best=resume.parse_best(words))
    with caplog.at_level(logging.WARNING):
        save(1, 2, 3, 4, 5, metrics=lambda number: {"eval/nll": nll[number]} if number != 5 else {})
        save(6, 7, 8, metrics=lambda number: {"eval/nll": jnp.float32(nll[number])})
    assert not caplog.records
    assert names(tmp_path) == [f"step_0000000{number}" for number in (best, 7, 8)]


@pytest.mark.parametrize("words", ["eval/nll", "least:eval/nll", "min:"])
def test_the_best_needs_a_direction_and_a_metric(words):
    with pytest.raises(ValueError, match=f"--keep-best is '{words}': write min: or max:"):
        resume.parse_best(words)


def damage_files(folder, change):
    for file in folder.rglob("*"):
        if file.is_file():
            change(file)


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "nothing in it": lambda path: (shutil.rmtree(path), path.mkdir()),
    "never completed": lambda path: (path / "_CHECKPOINT_METADATA").unlink(),
    "no place": lambda path: shutil.rmtree(path / "run"),
    "half a place": lambda path: halve(path / "run" / "metadata"),
    "half a metric": lambda path: halve(path / "metrics" / "metrics"),
    "no state": lambda path: shutil.rmtree(path / "state"),
    "no description of the state": lambda path: (path / "state" / "_METADATA").unlink(),
    "half a state": lambda path: damage_files(path / "state", halve),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_passed_over_with_a_warning_and_no_good_one_is_lost(tmp_path, damage):
    save = partial(save_steps, tmp_path, best=resume.parse_best("max:eval/nll"), metrics=lambda n: {"eval/nll": 1.0})
    save(1, 2)
    DAMAGES[damage](tmp_path / "step_00000002")
    with pytest.warns(UserWarning, match="step_00000002 is damaged and passed over"):
        found = resume.newest(tmp_path, state(0))
    assert found.step == 1
    save(2)
    assert names(tmp_path) == ["damaged_step_00000002", "step_00000001", "step_00000002"]
    assert resume.newest(tmp_path, state(0)).step == 2


def test_a_checkpoint_damaged_twice_is_set_aside_twice(tmp_path):
    save_steps(tmp_path, 1)
    for _ in range(2):
        save_steps(tmp_path, 2)
        (tmp_path / "step_00000002" / "run" / "metadata").write_text("{")
        with pytest.warns(UserWarning, match="step_00000002 is damaged"):
            assert resume.newest(tmp_path, state(0)).step == 1
    assert names(tmp_path) == ["damaged_step_00000002", "damaged_step_00000002-1", "step_00000001"]


@pytest.mark.parametrize("deleted", ["_CHECKPOINT_METADATA", "run", "metrics", "state"])
def test_one_that_was_being_deleted_when_the_run_was_killed_is_no_matter(tmp_path, deleted, recwarn):
    save = partial(save_steps, tmp_path, best=resume.parse_best("max:eval/nll"), metrics=lambda n: {"eval/nll": n})
    save(1, 2)
    part = tmp_path / "step_00000001" / deleted
    part.unlink() if part.is_file() else shutil.rmtree(part)
    assert resume.newest(tmp_path, state(0)).step == 2 and not recwarn
    save(3)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_unreadable_metrics_of_an_older_one_do_not_stop_a_run(tmp_path):
    save = partial(save_steps, tmp_path, best=resume.parse_best("max:eval/nll"), metrics=lambda n: {"eval/nll": 1.0})
    save(1, 2)
    (tmp_path / "step_00000001" / "metrics" / "metrics").write_text("")
    with pytest.warns(UserWarning, match="step_00000001 is damaged"):
        assert resume.newest(tmp_path, state(0)).step == 2
    save(3)
    assert names(tmp_path) == ["damaged_step_00000001", "step_00000002", "step_00000003"]


def test_when_all_are_damaged_it_says_so_and_touches_none(tmp_path):
    save_steps(tmp_path, 1)
    shutil.rmtree(tmp_path / "step_00000001" / "state")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match=r"all checkpoints in .* --overwrite"),
    ):
        resume.newest(tmp_path, state(0))
    assert names(tmp_path) == ["step_00000001"]


def test_another_state_is_an_error_and_not_damage(tmp_path):
    save_steps(tmp_path, 1)
    with pytest.raises(ValueError, match="is of another state: 'weights'"):
        resume.newest(tmp_path, state(0) | {"weights": jnp.zeros(4)})


def test_a_full_disk_is_told_in_one_sentence_and_leaves_the_earlier_ones(tmp_path):
    """A limit on the size of files stands for the full disk."""
    noise = state(2) | {"weights": jax.random.normal(jax.random.key(0), (400_000,))}
    save_steps(tmp_path, 1)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match=r"a checkpoint could not be written to .* \(.*\): see that there is room"):
            with resume.open_checkpoints(tmp_path) as save:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
                save(2, noise, {}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert resume.newest(tmp_path, state(0)).step == 1
    save_steps(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001", "step_00000002"], "what was half written is gone"


def test_a_save_under_way_does_not_see_what_the_next_steps_write(tmp_path):
    """Steps donate their state, and on a CPU the copy to the host may be a view of the very buffer."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))

    @partial(jax.jit, donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda leaf: leaf + 1, state)

    start = {"one": jax.random.normal(jax.random.key(0), (1_000_000,)), "many": jnp.arange(1_000_000.0)}
    state = start | {"many": jax.device_put(start["many"], split)}
    expected = {}
    with resume.open_checkpoints(tmp_path) as save:
        for done in range(1, 13):
            state = jax.block_until_ready(step(state))
            if done in (4, 8):
                expected[done] = jax.tree.map(np.array, state)
                save(done, state, {})
    for done, whole in expected.items():
        read = checkpoints.restore(tmp_path / f"step_{done:08d}" / "state", state)
        jax.tree.map(np.testing.assert_array_equal, read, whole)
        assert read["many"].sharding == split


def test_a_state_comes_back_on_other_devices_without_the_first_ones(tmp_path):
    def on(count):
        mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
        places = {"weights": PartitionSpec("data"), "key": PartitionSpec(), "step": PartitionSpec()}
        return {name: NamedSharding(mesh, spec) for name, spec in places.items()}

    whole = state(7) | {"weights": jnp.arange(16.0)}
    sharded = jax.device_put(whole, on(8))
    with resume.open_checkpoints(tmp_path) as save:
        save(7, sharded, {})
    like = checkpoints.shapes_of(jax.device_put(whole, on(2)))
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(like))
    jax.tree.map(lambda leaf: leaf.delete(), sharded)
    found = resume.newest(tmp_path, like).state
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == on(2)
    assert found["weights"].addressable_shards[0].data.shape == (8,)
    np.testing.assert_array_equal(found["weights"], np.arange(16.0))
    np.testing.assert_array_equal(jax.random.uniform(found["key"]), jax.random.uniform(jax.random.key(7)))


def test_a_run_is_reopened_with_the_same_options_only(tmp_path):
    options = {"steps": 10, "learning_rate": 1e-3, "resume": False, "out": "somewhere", "offload_reference": True}
    created = run_folder.create(tmp_path / "run", "sft", options)
    again = options | {"resume": True, "out": "elsewhere", "offload_reference": False}
    assert resume.reopen(tmp_path / "run", "sft", again) == created
    with pytest.raises(
        ValueError, match=r"other options \(learning_rate was 0.001 and is 0.1, steps was 10 and is 20\)"
    ):
        resume.reopen(tmp_path / "run", "sft", again | {"steps": 20, "learning_rate": 0.1})


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (lambda folder: None, "holds no run to resume"),
        (lambda folder: (folder / "config.json").write_text("{"), "holds no run to resume"),
        (lambda folder: run_folder.create(folder, "dpo", {}), "a run of dpo, not of sft"),
    ],
)
def test_what_is_no_such_run_is_refused(tmp_path, prepare, sentence):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        resume.reopen(tmp_path, "sft", {})


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match="--resume needs --out FOLDER"):
        resume.reopen(None, "sft", {})
