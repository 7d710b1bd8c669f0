"""Benchmarks of data preparation: splitting is linear in time and flat in memory, tokenising is quick.

python tests/bench/data.py [rows]
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "scripts")]

WORDS = re.findall(
    r"\w+", "the of and to in is you that it he was for on are as with his they at be this have from"
)


def write_rows(path: Path, count: int) -> None:
    """Write a dataset in Dahoas' format; prompts have 4 to 123 words, responses about 40."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (path / "files").mkdir(parents=True)
    schema = pa.schema([(name, pa.string()) for name in ("prompt", "chosen", "rejected")])
    with pq.ParquetWriter(path / "files/train.parquet", schema) as out:
        for start in range(0, count, 10_000):
            rows = [row(i) for i in range(start, min(start + 10_000, count))]
            out.write_table(pa.Table.from_pylist(rows, schema))


def row(i: int) -> dict[str, str]:
    text = " ".join(WORDS[(i * 7 + k * k) % len(WORDS)] for k in range(4 + i % 120))
    response = " ".join(WORDS[(i + 3 * k) % len(WORDS)] for k in range(40))
    return {
        "prompt": f"\n\nHuman: {i} {text}\n\nAssistant:",
        "chosen": f" {response}",
        "rejected": f" {response} no",
    }


def measure(folder: Path, count: int, stage: str) -> dict[str, float]:
    """Prepare `count` rows in a process of its own; return seconds, peak MB and tokens per second."""
    write_rows(folder / f"rows-{count}", count)
    command = [sys.executable, __file__, "child", str(folder), str(count), stage]
    return json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    )


def child(folder: Path, count: int, stage: str) -> None:
    from rlhf.config import stages
    from rlhf.data import preparation

    name = "Dahoas/rm-static"
    rows = {name: {"name": name}}
    # Splitting alone: a share so small that next to nothing is left to tokenise.
    shares = {"sft": 1.0, "reward": 4.0, "rlhf": 1e-3 if stage == "rlhf" else 4.0}
    config = stages.Preparation.model_validate(
        {"stage": stage, "max_tokens": 512, "shares": shares, "eval_share": 1e-3, "datasets": rows}
    )
    before, started = peak_mb(), time.monotonic()
    out = folder / f"out-{count}-{stage}"
    preparation.prepare(config, folder / "tokenizer", {name: folder / f"rows-{count}"}, out)
    seconds = time.monotonic() - started
    splits = json.loads((out / "card.json").read_text())["splits"]
    tokens = sum(s["tokens"] for s in splits.values())
    cores = len(os.sched_getaffinity(0))
    print(
        json.dumps(
            {
                "rows": count,
                "seconds": round(seconds, 1),
                "grew_mb": peak_mb() - before,
                "tokens_per_s_per_core": round(tokens / seconds / cores),
            }
        )
    )


def peak_mb() -> int:
    """Return the most memory that this process ever had, in MB; `getrusage` counts its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main() -> None:
    import hub_content

    from rlhf.sources import chat_tokenizer

    largest = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hub_content.opt(folder / "opt")
        chat_tokenizer.import_tokenizer(folder / "opt", folder / "tokenizer")
        splits = [measure(folder, count, "rlhf") for count in (largest // 4, largest)]
        print("splitting", *splits, sep="\n  ")
        slower = splits[1]["seconds"] / splits[0]["seconds"]
        more_mb = splits[1]["grew_mb"] - splits[0]["grew_mb"]
        print(f"four times the rows: {slower:.2f} times the seconds, {more_mb} MB more")
        tokenised = measure(folder, largest // 10, "sft")
        print("splitting and tokenising", tokenised, sep="\n  ")
    broken = {
        "splitting is not linear in time": slower > 5,
        "splitting is not flat in memory": more_mb > 150,
        "fewer than 50,000 tokens/s per core": tokenised["tokens_per_s_per_core"] < 50_000,
    }
    sys.exit("; ".join(text for text, is_broken in broken.items() if is_broken) or 0)


if __name__ == "__main__":
    child(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]) if sys.argv[1:2] == ["child"] else main()
