"""Benchmark: converting pickles takes next to no memory of its own, however large and many they are.

A pickle is mapped, and its pages go whenever others need the memory: what counts is what cannot go.

python tests/bench/conversion.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[2] / "scripts")]
SHARDS = (1, 6)
BOUND = 0.25  # of the largest pickle; without the mapping it would be 1


def publish(path: Path, shards: int) -> None:
    """Write an OPT of 300 MB as so many pickles; the largest of six has 100 MB."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=2000,
        hidden_size=1024,
        word_embed_proj_dim=1024,
        ffn_dim=4096,
        num_hidden_layers=12,
        num_attention_heads=16,
        max_position_embeddings=128,
    )
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in OPTForCausalLM(config).state_dict().items()}
    config.save_pretrained(path)
    names = list(shapes)
    for i in range(shards):
        tensors = {n: torch.ones(shapes[n], dtype=torch.float16) for n in names[i::shards]}
        torch.save(tensors, path / f"pytorch_model-{i + 1:05}-of-{shards:05}.bin")


def child(root: Path) -> None:
    from rlhf.sources import weights

    (root / "out").mkdir()
    weights.Conversion.of(root / "hub")  # the libraries' own memory does not count
    input("ready\n")
    weights.import_weights(root / "hub", root / "out", root / "work", ours=False)


def grown_mb(root: Path) -> int:
    """Return by how much a conversion's memory grows at most, seen from outside: it may hold the GIL."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, __file__, str(root)], **pipes) as process:
        process.stdout.readline()
        before = peak = anonymous_mb(process.pid)
        process.stdin.write("\n")
        process.stdin.close()
        while process.poll() is None:
            peak = max(peak, anonymous_mb(process.pid))
            time.sleep(0.001)
    if process.returncode:
        sys.exit("the conversion failed")
    return peak - before


def anonymous_mb(pid: int) -> int:
    """Return the memory that is a process's own, in MB: what is mapped from files may go at any time."""
    found = Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2]
    return int(found.split()[0]) // 1024 if found else 0  # none at its end


def main() -> None:
    shares = []
    for shards in SHARDS:
        with tempfile.TemporaryDirectory() as root:
            publish(Path(root) / "hub", shards)
            largest = max(path.stat().st_size for path in Path(root).glob("hub/*.bin")) / 2**20
            grew = grown_mb(Path(root))
        print(f"{shards} pickles, the largest of {largest:.0f} MB: {grew} MB more")
        shares.append(grew / largest)
    sys.exit("converting holds a pickle in memory" if max(shares) > BOUND else 0)


if __name__ == "__main__":
    child(Path(sys.argv[1])) if sys.argv[1:] else main()
