"""Draw docs/overview.svg: the graph of artefacts beside the curves of `tiny`.

python docs/overview.py [VOLUME]    # after `make demo`
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from rlhf import jsonl
from rlhf.config import yaml_file
from rlhf.config.scenario import load_config
from rlhf.store import layout
from rlhf.store.plan import Artefact, plan

PROJECT = Path(__file__).resolve().parents[1]
SCENARIO = "tiny"
LABELS = {"sft": "SFT", "reward": "reward model", "rlhf": "PPO", "eval": "comparison"}
COLOURS = {"model": "#d8e2f3", "dataset": "#d8e2f3", "data": "#e7e6e6", "eval": "#fde9d9"}
TRAINED = "#d5ecd4"


def main() -> None:
    volume = Path(sys.argv[1]) if len(sys.argv) > 1 else PROJECT
    plt.rcParams |= {"svg.hashsalt": "overview", "svg.fonttype": "none", "font.size": 9}
    figure, (graph, score, kl) = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=[2.6, 1, 1])
    draw_graph(graph)
    metrics = read(volume)
    for axis, name, title in (
        (score, "score", "score of the responses"),
        (kl, "kl_ref", "KL to the SFT model (nats)"),
    ):
        axis.plot([line["step"] for line in metrics], [line[name] for line in metrics], linewidth=1.5)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("PPO iteration")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PROJECT / "docs/overview.svg", metadata={"Date": None, "Creator": None})


def read(volume: Path) -> list[dict[str, Any]]:
    """Return the metrics of the scenario's PPO."""
    curves = volume / "results" / SCENARIO / "rlhf" / layout.CURVES
    return list(jsonl.read(curves.resolve().with_name(layout.METRICS)))


def draw_graph(axis: Any) -> None:
    """Draw the scenario's artefacts as boxes, inputs on the left, and arrows along which they are used."""
    config = load_config(yaml_file.read(PROJECT / "config.yaml"))
    artefacts = plan(config, lambda _: "", lambda _: "", [SCENARIO]).artefacts
    wanted = {path: a for path, a in artefacts.items() if SCENARIO in a.scenarios}
    columns: dict[str, int] = {}
    for path, artefact in wanted.items():  # parents come first
        columns[path] = 1 + max((columns[parent] for parent in artefact.parents.values()), default=-1)
    places = {path: place(path, columns) for path in wanted}
    for path, artefact in wanted.items():
        x, y = places[path]
        colour = COLOURS.get(artefact.stage, TRAINED)
        box = {"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": "#666666", "linewidth": 0.6}
        axis.text(x, y, label(artefact), ha="center", va="center", bbox=box, zorder=2, fontsize=8)
        for parent in direct_parents(artefact, wanted):
            arrow = {"arrowstyle": "-|>", "color": "#999999", "linewidth": 0.7, "shrinkA": 30, "shrinkB": 30}
            axis.annotate("", (x, y), places[parent], arrowprops=arrow, zorder=1)
    axis.set_xlim(-0.5, max(columns.values()) + 0.5)
    axis.set_ylim(-0.6, 3.6)
    axis.set_axis_off()


def direct_parents(artefact: Artefact, artefacts: dict[str, Artefact]) -> set[str]:
    """Return the parents that are not ancestors of other parents: fewer arrows say the same."""

    def ancestors(path: str) -> set[str]:
        parents = set(artefacts[path].parents.values())
        return parents.union(*map(ancestors, parents))

    parents = set(artefact.parents.values())
    return parents - set().union(*map(ancestors, parents))


def place(path: str, columns: dict[str, int]) -> tuple[float, float]:
    """Return where an artefact's box goes: its column, spread evenly over the height."""
    beside = [other for other in columns if columns[other] == columns[path]]
    return columns[path], 3 - 3 * (beside.index(path) + 0.5) / len(beside)


def label(artefact: Artefact) -> str:
    """Return the words in an artefact's box."""
    name = artefact.path.split("/")[-1].split("@")[0]
    if artefact.stage == "model":
        return f"model\n{name}"
    if artefact.stage == "dataset":
        return f"dataset\n{name}"
    if artefact.stage == "data":
        return f"rows for\n{LABELS[artefact.spec['config']['stage']]}"
    return LABELS[artefact.stage]


if __name__ == "__main__":
    main()
