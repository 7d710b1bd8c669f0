"""`tiny` learns on two processes with ZeRO-2, and its control, on one, does not: one seed of `make learn`."""

from __future__ import annotations

import json

TWO = "run: {processes: 2, zero_stage: 2, micro_batch_size: 16, threads: 1}"
ONE = "run: {processes: 1, zero_stage: 0, micro_batch_size: 32, threads: 1}"


def test_tiny_learns_what_is_preferred_and_a_control_with_shuffled_scores_does_not(empty):
    """The bounds are those of one process: an artefact does not depend on how it is run."""
    tiny = f"{{sft: {{{TWO}}}, reward: {{{TWO}}}, rlhf: {{{TWO}}}}}"
    control = f"{{base: tiny, rlhf: {{shuffle_scores: true, {ONE}}}}}"
    config = f"scenarios: {{tiny: {tiny}, control: {control}}}"
    names = ("tiny", "control")
    empty.snakemake(*(f"results/{name}/rlhf/eval" for name in names), config=config)
    rises = {}
    for name in names:
        f = json.loads((empty.volume / f"results/{name}/rlhf/eval/summary.json").read_text())
        rises[name] = f["judged_after"] - f["judged_before"]
        assert f["prompts"] == 512
        assert f["kl"] < 5
        assert f["distinct_2_after"] > 0.75
        assert f["words_after"] < 1.45 * f["words_before"]
        if name == "tiny":
            assert f["judged_matched_length_after"] - f["judged_matched_length_before"] > 0.25
    assert rises["tiny"] > 0.25
    assert rises["control"] < 0.05
    reward = next(empty.volume.glob("store/reward/*"))
    metrics = json.loads((reward / "provenance.json").read_text())["metrics"]
    assert metrics["eval_accuracy"] > 0.78
    assert metrics["eval_rows"] >= 2000
