"""Responses of ZeRO-3 models by gathered and by shared copies: `launch.py --processes 2 copies.py OUT FAMILY=PATH...`.

Every process writes `{family}-{size}-{rank}.pt`: its responses, and how large its copy is. Not a test.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import trainings

from rlhf import parallel
from rlhf.data.rows import Rows
from rlhf.data.streams import Purpose, Stream
from rlhf.generation import distributed
from rlhf.generation.sampler import Sampler
from rlhf.generation.sampling import Sampling
from rlhf.models import loading
from rlhf.training import engine


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
            model = loading.load_actor(Path(path), torch.float32)
        for size in (1, 2):
            sampling = Sampling(12, 1.0, trainings.EOS, trainings.PAD)
            sampler = Sampler(model, sampling, parallel.group(size))
            sampler.refresh()
            divided = run.model_copy(update={"inference_tp_size": size})
            stream = Stream(1, Purpose.ROLLOUT, 5)
            generated = list(distributed.sample(sampler, prompts, stream, divided))
            responses = [
                row[mask].tolist()
                for g in generated
                for row, mask in zip(g.responses, g.response_mask, strict=True)
            ]
            sizes = {"+".join(s.names): (s.target.numel(), s.split) for s in sampler.weights()}
            torch.save((responses, sizes), Path(out) / f"{family}-{size}-{parallel.rank()}.pt")
    parallel.barrier()


if __name__ == "__main__":
    main()
