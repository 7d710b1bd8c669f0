"""The result of a training does not depend on processes, ZeRO stages and micro-batches.

Tolerances: losses and gradient norms of single steps agree to 1e-4 (fp32, sums in another order),
weights after ten steps to 2e-3 in total, since Adam divides small gradients by their own size. With LoRA
that shows in the second iteration of PPO already, whose gradient norms agree to 1e-3: adapters begin at 0.
"""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
import trainings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

STAGES, ZERO = ("sft", "reward", "rlhf"), (0, 1, 2, 3)


def case(stage, zero, name="", *, again=False, **changes):
    run = {"zero_stage": zero, **changes.pop("run", {})}
    return {
        "name": name or f"{stage}-{zero}",
        "stage": stage,
        "changes": {**changes, "run": run},
        "again": again,
    }


@pytest.fixture(scope="module")
def sources(actor_path, tmp_path_factory):
    from rlhf.models import loading

    root = tmp_path_factory.mktemp("sources")
    loading.new_scorer(actor_path, torch.float32, trainings.PAD, seed=3).save_pretrained(root / "scorer")
    for stage in STAGES:
        trainings.write_rows(root / "data" / stage, stage, vocabulary=64)
    return {"actor": actor_path, "scorer": root / "scorer", "data": root / "data"}


LORA = {"dim": 4, "alpha": 8, "learning_rate": 0.01}
OTHER_LORA = {"dim": 2, "alpha": 6, "learning_rate": 0.001}
LORAS = {
    "sft": {"lora": LORA},
    "reward": {"lora": LORA | {"only": False}},
    "rlhf": {"actor_lora": LORA, "critic_lora": OTHER_LORA, "ema_decay": 0.5},
}
MEANS = {"ema_decay": 0.5, "ptx_coef": 2.0}
SHARED = {"inference_tp_size": 2}  # one copy of the actor to sample, for both processes
EVERYTHING_OFF = {"offload": ["optimizer", "parameters", "reference"], "gradient_checkpointing": True}
SAME = {  # name -> a case, and the name of the case whose results it must have
    **{
        f"{stage}-checkpointed": (case(stage, 0, run={"gradient_checkpointing": True}), f"{stage}-0")
        for stage in STAGES
    },
    **{f"{stage}-micro": (case(stage, 0, run={"micro_batch_size": 2}), f"{stage}-0") for stage in STAGES},
    **{
        f"{stage}-packed-{zero}": (case(stage, zero, run={"packing": True}), f"{stage}-0")
        for stage in ("sft", "reward")
        for zero in (0, 3)
    },
    "sft-offload-2": (case("sft", 2, run={"offload": ["optimizer"]}), "sft-0"),
    "reward-offload-3": (case("reward", 3, run={"offload": ["optimizer", "parameters"]}), "reward-0"),
    "rlhf-offload-0": (case("rlhf", 0, run={"offload": ["reference"]}), "rlhf-0"),
    "rlhf-offload-3": (case("rlhf", 3, run=EVERYTHING_OFF), "rlhf-0"),
    **{
        f"lora-{stage}-{zero}": (case(stage, zero, again=True, **LORAS[stage]), f"lora-{stage}")
        for stage in STAGES
        for zero in (0, 2, 3)
    },
    "shared-3": (case("rlhf", 3, run=SHARED, again=True), "rlhf-0"),
    "shared-lora-3": (case("rlhf", 3, run=SHARED, again=True, **LORAS["rlhf"]), "lora-rlhf"),
    **{f"means-{zero}": (case("rlhf", zero, again=True, **MEANS), "means") for zero in (0, 2, 3)},
}
HALF = [
    case(
        "sft", zero, f"{dtype}-{zero}", dtype=dtype, again=dtype == "bf16" and zero < 2
    )  # flat, with 32-bit copies
    for dtype in ("bf16", "fp16")
    for zero in ZERO
]
SCALED_ZERO, OVERFLOWS = (0, 2, 3), {"ptx_coef": 4.0, "mini_batches": 1, "iterations": 6}
SCALED = [case("rlhf", zero, f"scaled-{zero}", dtype="fp16", again=True, **OVERFLOWS) for zero in SCALED_ZERO]


@pytest.fixture(scope="module")
def results(sources, tmp_path_factory):
    """Return (processes, name of a case) -> directory of its results."""
    cases = [case(stage, zero) for stage in STAGES for zero in ZERO]
    resumed = [{**c, "again": c["name"][-1] != "1"} for c in cases]
    same = [{**c, "name": name} for name, (c, _) in SAME.items()]
    loras = [case(stage, 0, f"lora-{stage}", **LORAS[stage]) for stage in STAGES]
    launched = {1: [*cases, case("rlhf", 0, "means", **MEANS), *loras], 2: [*resumed, *same, *HALF, *SCALED]}
    out = {n: trainings.launch(tmp_path_factory.mktemp("cases"), n, sources, c) for n, c in launched.items()}
    return {(n, path.name): path for n in out for path in out[n].iterdir()}


def columns(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {name: np.array([line[name] for line in lines]) for name in lines[0]}


def assert_equal_trainings(one, two, rel=1e-4):
    """Compare every metric of every step; metrics near zero by their absolute size."""
    first, second = columns(one), columns(two)
    assert first.keys() == second.keys()
    for name, values in first.items():
        np.testing.assert_allclose(second[name], values, rtol=rel, atol=2e-5, err_msg=name)


def distance(one, two):
    """Return the norm of the difference of two models' weights, in the second one's dtype."""
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    assert first.keys() == second.keys()
    squares = [(w.float() - first[n].to(w.dtype).float()).norm() ** 2 for n, w in second.items()]
    return float(sum(squares)) ** 0.5


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_every_step_is_the_same_over_processes_and_zero_stages(results, stage, zero, processes):
    """Ten steps of SFT and of the reward model; two whole iterations of PPO, with responses, rewards and whitening."""
    reference = results[1, f"{stage}-0"]
    assert_equal_trainings(reference, results[processes, f"{stage}-{zero}"])
    expected, found = (
        json.loads((path / "measured.json").read_text())
        for path in (reference, results[processes, f"{stage}-{zero}"])
    )
    assert found == pytest.approx(expected, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize(("name", "reference"), [(name, of) for name, (_, of) in SAME.items()])
def test_every_step_is_the_same_over_micro_batches_packing_checkpointing_and_offload(
    results, name, reference
):
    assert_equal_trainings(results[1, reference], results[2, name], rel=1e-3 if "lora-rlhf" in name else 1e-4)


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_agree_with_fp32_within_their_precision(results, dtype, zero):
    """bf16 has 8 bits of mantissa, fp16 11: losses of ten steps within 2%, gradient norms within 5%."""
    expected, found = columns(results[1, "sft-0"]), columns(results[2, f"{dtype}-{zero}"])
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=0.02)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=0.05)


@pytest.mark.parametrize("zero", SCALED_ZERO)
def test_steps_that_fp16_skips_are_logged_and_the_others_learn(results, sources, zero):
    """Loss scales begin at 2 ** 16, where four times an SFT gradient overflows: its norm is reported as 0.

    The other steps move the weights as steps in fp32 do.
    """
    path = results[2, f"scaled-{zero}"]
    found = columns(path)
    norms = found["actor_grad_norm"], found["critic_grad_norm"]
    skipped = sorted(step for values in norms for step, norm in enumerate(values, 1) if norm == 0)
    assert all(0 < np.count_nonzero(values == 0) < len(values) for values in norms)
    logged = [line for line in (path / "warnings.txt").read_text().splitlines() if "skipped" in line]
    assert logged == [f"step {step} was skipped: its gradient overflowed in fp16" for step in skipped]
    assert all(np.isfinite(values).all() for values in found.values())
    assert (
        0.4
        < distance(sources["actor"], path / "model")
        / distance(sources["actor"], results[1, "rlhf-0"] / "model")
        < 2
    )


def test_mean_weights_are_those_of_every_step(results, sources):
    """With a decay of 0.5 over four steps they lag one step or so behind the last weights."""
    last, means = (results[2, "means-0"] / name for name in ("model", "model_ema"))
    assert 0.1 < distance(last, means) / distance(last, sources["actor"]) < 0.5


def test_ptx_changes_the_trained_weights(results, sources):
    """At least half as much as PPO changes them; EMA changes nothing."""
    without, learned = results[1, "rlhf-0"] / "model", results[1, "means"] / "model"
    assert distance(without, learned) > 0.5 * distance(sources["actor"], without)


def test_a_step_with_adapters_moves_the_actor_but_not_the_reference(results):
    divergence = columns(results[1, "lora-rlhf"])["kl_ref"]
    assert divergence[0] == pytest.approx(0, abs=1e-4)
    assert abs(divergence[1]) > 1e-3  # an estimate from 16 responses, that may be negative


def test_actor_and_critic_each_have_their_own_adapters(results):
    """Dimensions as configured; B begins at 0 and is within four Adam steps of its learning rate."""
    path = results[1, "lora-rlhf"]
    assert (columns(path)["actor_learning_rate"] == LORA["learning_rate"]).all()
    for role, settings in (("model", LORA), ("critic", OTHER_LORA)):
        tensors = load_file(path / f"{role}_adapter/adapter_model.safetensors")
        a, b = ([t for n, t in tensors.items() if f"lora_{part}" in n] for part in "AB")
        assert {t.shape[0] for t in a} == {t.shape[1] for t in b} == {settings["dim"]}
        farthest = max(float(t.abs().max()) for t in b)
        assert settings["learning_rate"] < farthest < 5 * settings["learning_rate"]


def test_switches_take_effect(results):
    """Other tests show that they change no result; this one looks at engines, frozen models and packed rows."""
    tested = defaultdict(set)
    for path in results.values():
        done = json.loads((path / "done.json").read_text())
        run, frozen = done["run"], done["frozen"]
        expected = {name: run[name] for name in ("zero_stage", "gradient_checkpointing")}
        expected["offload"] = [what for what in ("optimizer", "parameters") if what in run["offload"]]
        assert all(engine.items() >= expected.items() for engine in done["engines"]), path
        if "packing" in run:
            expected["packing"] = run["packing"]
            sequences, rows = np.sum(done["packs"], axis=0) if done["packs"] else (1, 1)
            assert (rows < 0.6 * sequences) == run["packing"], path
        if len(frozen) == 2:  # the reference and the reward model
            expected["reference"] = "reference" in run["offload"]
            assert (frozen[0]["offload"] == ["parameters"]) == expected["reference"], path
        for name, value in expected.items():
            tested[name].add(str(value))
    assert len(tested) == 5
    assert all(len(values) > 1 for values in tested.values()), tested


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_mean_weights_are_the_same_under_every_zero_stage(results, zero):
    expected = load_file(results[1, "means"] / "model_ema/model.safetensors")
    found = load_file(results[2, f"means-{zero}"] / "model_ema/model.safetensors")
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, atol=2e-3, rtol=0)


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_saved_models_are_the_same(results, stage, zero, processes):
    for role in ("model", "critic") if stage == "rlhf" else ("model",):
        one, two = (path / role for path in (results[1, f"{stage}-0"], results[processes, f"{stage}-{zero}"]))
        expected, found = (load_file(path / "model.safetensors") for path in (one, two))
        assert found.keys() == expected.keys()
        for name, weights in expected.items():
            torch.testing.assert_close(
                found[name], weights, atol=2e-3, rtol=0, msg=lambda m, n=f"{role} {name}": f"{n}: {m}"
            )
        assert (one / "config.json").read_text() == (two / "config.json").read_text()


def test_a_sharded_model_is_saved_a_file_at_a_time(results):
    path = results[2, "sft-3"]
    files = sorted((path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        tensors = load_file(file)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= trainings.SHARD_BYTES or len(tensors) == 1
    (path / "shards/config.json").write_bytes((path / "model/config.json").read_bytes())
    one, two = (AutoModelForCausalLM.from_pretrained(path / name) for name in ("model", "shards"))
    for name, weights in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], weights), name


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_weights_published_with_adapters_are_the_same_under_every_zero_stage(results, stage, zero):
    expected = load_file(results[1, f"lora-{stage}"] / "model/model.safetensors")
    assert expected.keys() == load_file(results[1, f"{stage}-0"] / "model/model.safetensors").keys()
    found = load_file(results[2, f"lora-{stage}-{zero}"] / "model/model.safetensors")
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, atol=2e-3, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_state_holds_trained_weights_only(results):
    for name in ("sft-0", "lora-sft-0", "lora-rlhf-0"):
        saved, learned = json.loads((results[2, name] / "state.json").read_text())
        assert saved == learned > 0, name


RESUMED = (*STAGES, "means", *(f"lora-{stage}" for stage in STAGES))


@pytest.mark.parametrize(
    "name",
    [
        *(f"{name}-{zero}" for name in RESUMED for zero in (0, 2, 3)),
        *(f"scaled-{zero}" for zero in SCALED_ZERO),
        "shared-3",
        "shared-lora-3",
        "bf16-0",
        "bf16-1",
    ],
)
def test_a_resumed_training_on_two_processes_gives_the_same_bytes(results, name):
    path = results[2, name]
    files = ("metrics.jsonl", "model/model.safetensors", "model/config.json")
    more = {"means": "model_ema/model.safetensors", "rlhf": "critic/model.safetensors"}
    for file in (*files, *(file for word, file in more.items() if word in name)):
        assert (path / "again" / file).read_bytes() == (path / file).read_bytes(), file
