"""The state of an unfinished training: saved whole, checked, and taken up from the newest.

`work/{stage}/{name}/step-000200/` holds DeepSpeed's checkpoints, RNG and what the loop needs, with
`hashes.json` written last. DeepSpeed's files are pickles: only our own are read, after their hashes.
The directory carries its artefact's name, so no state is ever taken up by another configuration.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf import store
from rlhf.workdir import hold

logger = logging.getLogger(__name__)

KEPT = 2  # newest states: should the last one be damaged, there is one before it
HASHES = "hashes.json"


@dataclass
class State:
    """The states in `work`, of engines by role."""

    work: Path
    engines: dict[str, Any]

    def lock(self) -> None:
        """Keep others from training the same artefact (see `workdir.hold`)."""
        hold(self.work)

    def save(self, step: int, loop: dict[str, Any]) -> None:
        """Save everything after `step` steps; older states but the last ones go."""
        final = self.work / f"step-{step:06d}"
        partial = self.work / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for role, engine in self.engines.items():
            engine.save_checkpoint(str(partial / role), tag="state")
        save_file({"torch": torch.get_rng_state()}, partial / "rng.safetensors")
        store.write_json(partial / "loop.json", loop)
        store.write_json(partial / HASHES, store.file_hashes(partial))
        store.sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        for old in self._states()[KEPT:]:
            shutil.rmtree(old)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Take up the newest whole state; return its step and loop values, or None."""
        for path in self._states():
            if not _is_whole(path):
                logger.warning("%s is damaged and not used", path)
                continue
            for role, engine in self.engines.items():
                engine.load_checkpoint(str(path / role), tag="state")
            torch.set_rng_state(load_file(path / "rng.safetensors")["torch"])
            loop: dict[str, Any] = json.loads((path / "loop.json").read_text())
            step = int(path.name.removeprefix("step-"))
            logger.info("resumed after step %d from %s", step, path)
            return step, loop
        return None

    def _states(self) -> list[Path]:
        """Return all states, the newest first."""
        return sorted(self.work.glob("step-*"), reverse=True)


def _is_whole(path: Path) -> bool:
    try:
        recorded = json.loads((path / HASHES).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    found = store.file_hashes(path)
    found.pop(HASHES, None)
    return bool(recorded == found)
