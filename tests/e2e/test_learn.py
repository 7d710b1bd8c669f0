"""A smaller `make learn` of one seed: PPO on two processes with ZeRO-2 learns; its control on one does not."""

from __future__ import annotations

import json

SMALLER = {"base": "tiny", "sft": {"steps": 450}, "reward": {"epochs": 1.25}}
TWO = {"processes": 2, "zero_stage": 2, "micro_batch_size": 16, "threads": 1}
SCENARIOS = {
    "learns": {**SMALLER, "rlhf": {"iterations": 50, "run": TWO}},
    "control": {**SMALLER, "rlhf": {"iterations": 50, "run": {"threads": 1}, "shuffle_scores": True}},
}


def test_tiny_learns_what_is_preferred_and_a_control_with_shuffled_scores_does_not(empty):
    """The bounds are those of `make learn`: an artefact does not depend on how many processes build it."""
    config = f"scenarios: {json.dumps(SCENARIOS)}"
    empty.snakemake(*(f"results/{name}/rlhf/eval" for name in SCENARIOS), config=config)
    rises = {}
    for name in SCENARIOS:
        f = json.loads((empty.volume / f"results/{name}/rlhf/eval/summary.json").read_text())
        rises[name] = f["judged_after"] - f["judged_before"]
        assert f["prompts"] == 512
        assert f["kl"] < 5
        assert f["distinct_2_after"] > 0.75
        assert f["words_after"] < 1.45 * f["words_before"]
        if name == "learns":
            assert f["judged_matched_length_after"] - f["judged_matched_length_before"] > 0.25
    assert rises["learns"] > 0.25
    assert rises["control"] < 0.05
    reward = next(empty.volume.glob("store/reward/*"))
    metrics = json.loads((reward / "provenance.json").read_text())["metrics"]
    assert metrics["eval_accuracy"] > 0.78
    assert metrics["eval_rows"] >= 2000
