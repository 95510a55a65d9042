"""Plans of a tiny model on CPU devices that stand for GPUs; the bytes of a large one by arithmetic."""

import json

import jax
import pytest

from rlhf_jax.parallel.mesh import MeshShape, make_mesh
from rlhf_jax.parallel.plan.programs import device_bytes
from rlhf_jax.parallel.plan.steps import Machine


def tiny(script, tmp_path, **options):
    sizes = dict(batch_size=4, prompt_length=8, response_length=8, topology="h100:4")
    return script.Config(out=tmp_path / "run", **sizes | options)


def test_ppo_of_a_folder_without_weights(script, tmp_path, tiny_model):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_model / "config.json").read_text())
    result = script.main(tiny(script, tmp_path, model=str(folder), dtype="float32"))
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["mesh"] == "fsdp=4, rollouts on data=4" and plan["estimate"] and plan["fits"]
    assert [phase["name"] for phase in plan["phases"]] == ["rollout", "score", "update"]
    assert [check["pass"] for check in result["checks"]] == [True]
    rollout, _, update = plan["phases"]
    assert "it is counted 7 times" in rollout["notes"][0]
    assert update["sent_bytes"]["all-gather"] + update["sent_bytes"]["all-reduce"] > 0
    assert (tmp_path / "run" / "figures" / "memory.png").is_file()


@pytest.mark.parametrize("algorithm", ["sft", "reward_model", "dpo", "grpo", "score"])
def test_every_algorithm_has_its_phases(script, tmp_path, algorithm):
    """Shapes only: what `main` would compile."""
    options = dict(samples=2) if algorithm == "grpo" else {}
    reward = "ensemble" if algorithm == "score" else "function"
    config = tiny(script, tmp_path, model="qwen3-0.6b", algorithm=algorithm, reward=reward, **options)
    script.check_config(config)
    model = script.model_of(config)
    one = Machine(make_mesh(MeshShape(fsdp=4), jax.devices()[:4]), model)
    step = script.step_of(config, one, one)
    names = {"grpo": ["rollout", "update"], "score": ["score"]}.get(algorithm, ["update"])
    assert [program.name for program in step.programs] == names
    for program in step.programs:
        with jax.set_mesh(program.mesh):
            assert jax.eval_shape(program.function, *program.arguments) is not None
        assert program.flops > 0 and set(program.reads) <= set(step.roles)


def test_parameters_and_optimizer_are_the_bytes_of_the_arithmetic(script, tmp_path):
    """Llama-3-8B over 8 devices: 8.03 billion parameters of 4 bytes, and 8 bytes of Adam for each.

    A value net has no unembedding, but a head of 4,097.
    """
    config = tiny(script, tmp_path, model="llama-3-8b", reward="function", batch_size=16)
    machine = Machine(make_mesh(MeshShape(fsdp=8), jax.devices()[:8]), script.model_of(config))
    roles = script.step_of(config, machine, machine).roles
    policy, value = 8_030_261_248, 8_030_261_248 - 128_256 * 4096 + 4097
    expected = {"policy": 4 * policy, "value": 4 * value, "reference": 2 * policy, "optimizer": 8 * (policy + value)}
    for name, size in expected.items():
        assert device_bytes(roles[name]) == pytest.approx(size / 8, rel=0.01), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(model="llama-9"), "--model llama-9 is no published shape"),
        (dict(topology="tpu:2x2"), "names no known chip"),
        (dict(mesh="fsdp=3"), "has 3 = 3 devices, but there are 4|does not divide"),
        (dict(samples=2), "--samples 2 belongs to --algorithm grpo"),
        (dict(accumulate=3), "4 rows do not split into --minibatches 1 x --accumulate 3"),
        (dict(algorithm="score", reward="function"), "nothing to compile"),
        (dict(algorithm="sft", minibatches=2), "belongs to ppo and grpo"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(script, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        script.main(tiny(script, tmp_path, **dict(model="qwen3-0.6b") | options))
