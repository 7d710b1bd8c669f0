"""Replies of ZeRO-3 models by gathered and by shared copies: `launch.py --processes 2 copies.py OUT FAMILY=PATH...`.

Every process writes `{family}-{size}-{rank}.pt`: its replies, and how large its copy is. Not a test.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import trainings

from rlhf import engine, models, parallel, rollout, sharding
from rlhf.generation import Sampling
from rlhf.rows import Rows
from rlhf.streams import Purpose


def main() -> None:
    out, data, *paths = sys.argv[1:]
    run = trainings.settings(
        "rlhf", {"run": {"processes": 2, "zero_stage": 3, "generation_batch_size": 3}}
    ).run
    engine.start(run)
    rows = Rows(Path(data) / "train")
    prompts = [rows[i][0] for i in range(16)]
    for family, path in (text.split("=") for text in paths):
        with engine.loading(Path(path), "fp32", sharded=True):
            model = models.load_actor(Path(path), torch.float32)
        for size in (1, 2):
            copy = sharding.generator(model, parallel.group(size))
            how = run.model_copy(update={"inference_tp_size": size})
            sampling = Sampling(12, 1.0, trainings.EOS, trainings.PAD)
            made = list(rollout.sample(copy, prompts, sampling, 1, Purpose.ROLLOUT, 5, how))
            replies = [
                row[mask].tolist()
                for g in made
                for row, mask in zip(g.responses, g.response_mask, strict=True)
            ]
            sizes = {name: p.numel() for name, p in copy.named_parameters()}
            torch.save((replies, sizes), Path(out) / f"{family}-{size}-{parallel.rank()}.pt")
    parallel.barrier()


if __name__ == "__main__":
    main()
