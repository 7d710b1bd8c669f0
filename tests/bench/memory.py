"""Benchmark: peak memory of a PPO iteration, all weights trained against LoRA on actor and critic.

    python tests/bench/memory.py

Both do the same iteration in a process of its own. Peak is the process's (resident memory on a CPU,
allocated memory on a GPU); the memory of the libraries before any model is loaded is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "math"))
import trainings

LORA = {"dim": 8, "alpha": 8, "learning_rate": 1e-4}


def measure(root: Path, dtype: str, hidden: int, layers: int) -> dict[str, dict[str, float]]:
    """Return what is trained -> memory in MiB."""
    from rlhf.models import loading

    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=8192,
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            max_position_embeddings=256,
            dropout=0.0,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(root / "actor")
    loading.new_scorer(root / "actor", torch.float32, 1, seed=3).save_pretrained(root / "scorer")
    trainings.write_rows(root / "data/rlhf", "rlhf", vocabulary=8192, longest=32)
    sources = {"actor": root / "actor", "scorer": root / "scorer", "data": root / "data"}
    found = {}
    for name, adapters in (("all weights", {}), ("LoRA", {"actor_lora": LORA, "critic_lora": LORA})):
        where = root / name.replace(" ", "-")
        where.mkdir()
        changes = {"iterations": 1, "dtype": dtype, **adapters}
        cases = [{"name": "ppo", "stage": "rlhf", "changes": changes}]
        trainings.launch(where, 1, sources, cases, gpus=int(torch.cuda.is_available()))
        found[name] = json.loads((where / "out/ppo/memory.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found = measure(Path(root), args.dtype, args.hidden, args.layers)
    for name, memory in found.items():
        print(f"{name:<12} peak {memory['peak_mib']:8.0f} MiB, before models {memory['before_mib']:6.0f} MiB")
    whole, adapters = found["all weights"], found["LoRA"]
    print(f"LoRA needs {adapters['peak_mib'] / whole['peak_mib']:.0%} of the peak")


if __name__ == "__main__":
    main()
