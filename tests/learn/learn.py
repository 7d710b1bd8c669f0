"""Benchmark: does PPO learn? Seeds 1, 2, 3 of `tiny`; for each a control with shuffled scores, and four PPO epochs.

    make learn [LEARN_DIR=where artefacts go] [LEARN_SEEDS="1 2 3"]

Prints a table and fails if a bound is broken. It measures the mean VADER compound of sampled
responses to 512 held-out prompts, before (SFT) and after (RLHF), one fixed sampling seed.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "scripts"))
from rlhf.training import health  # noqa: E402

SEEDS = tuple(int(seed) for seed in os.environ.get("LEARN_SEEDS", "1 2 3").split())
FOUR_EPOCHS = {"ppo_epochs": 4, "kl_coef": 0.35, "actor": {"learning_rate": 1.0e-4}}


def main() -> None:
    volume = volume_of("learn-")
    scenarios: dict[str, dict] = {}
    for seed in SEEDS:
        scenarios[f"learn-{seed}"] = {"base": "tiny", "seed": seed, "rlhf": {"run": {"threads": 1}}}
        for name, changes in {"control": {"shuffle_scores": True}, "four-epochs": FOUR_EPOCHS}.items():
            scenarios[f"{name}-{seed}"] = {"base": f"learn-{seed}", "rlhf": changes}
    targets = [f"results/{name}/rlhf/eval" for name in scenarios]
    snakemake(volume, scenarios, targets + [f"results/learn-{seed}/reward/model" for seed in SEEDS])
    broken = [text for name in scenarios for text in report(volume / "results" / name, name)]
    broken += [text for name in scenarios for text in unhealthy(volume, name)]
    broken += [text for seed in SEEDS for text in accuracy(volume / f"results/learn-{seed}/reward/model")]
    print("\n".join(broken) or "all bounds hold")
    sys.exit(1 if broken else 0)


def volume_of(prefix: str) -> Path:
    """Return the directory where artefacts go: LEARN_DIR, or a new one."""
    volume = Path(os.environ.get("LEARN_DIR") or tempfile.mkdtemp(prefix=prefix)).resolve()
    volume.mkdir(parents=True, exist_ok=True)
    return volume


def snakemake(volume: Path, scenarios: dict[str, dict], targets: list[str], *options: str) -> None:
    """Make `targets` of scenarios that are added to those of `config.yaml`."""
    (volume / "config.json").write_text(json.dumps({"pvc": str(volume), "scenarios": scenarios}))
    command = ["snakemake", *targets, "--configfile", str(volume / "config.json"), *options]
    subprocess.run(command, cwd=PROJECT, check=True)


def report(results: Path, name: str) -> list[str]:
    """Print a scenario's figures; return which bounds they break."""
    f = json.loads((results / "rlhf/eval/summary.json").read_text())
    rise = f["judged_after"] - f["judged_before"]
    means = [f[f"judged_matched_length_{when}"] for when in ("before", "after")]
    # Without a word count in common it is no number, which breaks its bound.
    matched = math.nan if None in means else means[1] - means[0]
    words = f["words_after"] / f["words_before"] - 1
    print(
        f"{name:<13} {f['judged_before']:.3f} -> {f['judged_after']:.3f} ({rise:+.3f}, matched length"
        f" {matched:+.3f})  KL {f['kl']:.2f}  words {words:+.0%}  distinct-2 {f['distinct_2_after']:.2f}"
    )
    if name.startswith("control"):
        bounds = {"rises by more than 0.05": not rise <= 0.05}
    else:
        bounds = {
            "rises by less than 0.25": not rise >= 0.25,
            "rises by less than 0.25 at matched length": not matched >= 0.25,
            "KL above 5": not f["kl"] <= 5,
            "distinct-2 at most 0.75": f["distinct_2_after"] <= 0.75,
            "words up by more than 45%": words > 0.45,
            "fewer than 512 prompts": f["prompts"] < 512,
            "lengths have less than 0.9 in common": min(f["in_common_before"], f["in_common_after"]) < 0.9,
        }
    return [f"{name}: {text}" for text, is_broken in bounds.items() if is_broken]


def unhealthy(volume: Path, name: str) -> list[str]:
    """Print how far PPO's updates went; return which bounds of `training/health` an iteration broke."""
    ppo = ppo_of(volume, name)
    lines = [json.loads(line) for line in (ppo / "metrics.jsonl").read_text().splitlines()]
    bounds = [b for b in health.BOUNDS if b.metric in ("ratio_mean", "clip_fraction", "approx_kl")]
    ranges = {b.metric: [f([line[b.metric] for line in lines]) for f in (min, max)] for b in bounds}
    print(
        f"{name:<13} "
        + ", ".join(f"{m} {low:.4f} to {high:.4f}" for m, (low, high) in ranges.items())
        + f"; {seconds_per_sample(ppo):.4f} s per sample on one thread"
    )
    return [
        f"{name}: {health.in_words(b, value)}"
        for b in bounds
        for value in ranges[b.metric]
        if not b.least <= value <= b.most
    ]


def ppo_of(volume: Path, name: str) -> Path:
    """Return the PPO artefact that a scenario's comparison is of."""
    record = json.loads((volume / "results" / name / "rlhf/eval/provenance.json").read_text())
    return volume / record["parents"]["rlhf"]


def seconds_per_sample(ppo: Path) -> float:
    """Return the seconds of a whole PPO training over the responses that it sampled."""
    config = json.loads((ppo / "provenance.json").read_text())["config"]
    seconds: float = json.loads((ppo / "run.json").read_text())["seconds"]
    return seconds / samples(config)


def samples(config: dict[str, int]) -> int:
    """Return how many responses a PPO training samples to learn from."""
    return config["iterations"] * config["rollout_batch_size"]


def accuracy(model: Path) -> list[str]:
    """Print the reward model's accuracy; return which bounds it breaks."""
    metrics = json.loads((model.resolve().parent / "provenance.json").read_text())["metrics"]
    print(
        f"{model.parts[-3]}: reward accuracy {metrics['eval_accuracy']:.3f} on {metrics['eval_rows']:.0f} pairs"
    )
    broken = metrics["eval_accuracy"] < 0.78 or metrics["eval_rows"] < 2000
    return [f"{model}: accuracy below 0.78 or fewer than 2,000 pairs"] if broken else []


if __name__ == "__main__":
    main()
