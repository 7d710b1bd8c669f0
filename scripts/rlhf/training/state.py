"""The state of an unfinished training: saved whole, checked, and resumed from the newest.

`work/{stage}/{name}/step-000200/` has DeepSpeed's checkpoints, the RNG and what the loop needs;
`hashes.json` is written last. DeepSpeed's files are pickles: only our own are read, after their hashes
are checked. The directory has its artefact's name, so that no other configuration ever resumes from it.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf import files, parallel
from rlhf.errors import UserError
from rlhf.store import provenance
from rlhf.store.layout import METRICS
from rlhf.store.workdir import hold

logger = logging.getLogger(__name__)

KEPT = 2  # newest states: if the last one is damaged, the one before it is used
HASHES, LOOP = "hashes.json", "loop.json"


@dataclass
class State:
    """The states in `work`; `shard_layout` says over how many processes they are sharded, and how.

    `engines` is role -> DeepSpeed engine, of which only trained weights are saved. `tensors` is name -> a
    dictionary of tensors of any shapes and dtypes, which loading fills in place. `shared` has the names of
    dictionaries that are equal in every process, and saved once.
    """

    work: Path
    shard_layout: dict[str, int]
    engines: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)

    def lock(self) -> None:
        """Keep others from training the same artefact (see `workdir.hold`); rank 0 holds the lock.

        Raises:
            UserError: another process holds it.
        """
        if parallel.rank() == 0:
            hold(self.work)
        parallel.barrier()

    def save(self, step: int, loop: dict[str, Any]) -> None:
        """Save everything after `step` steps, all processes together, and remove older states."""
        final = self.work / f"step-{step:06d}"
        partial = self.work / f".{final.name}.partial"
        if parallel.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        parallel.barrier()
        for role, engine in self.engines.items():
            engine.save_checkpoint(str(partial / role), tag="state", exclude_frozen_parameters=True)
        for name, tensors in self.tensors.items():
            if parallel.rank() == 0 or name not in self.shared:
                save_file({n: t.contiguous() for n, t in tensors.items()}, self._file(partial, name))
        parallel.barrier()
        if parallel.rank() == 0:
            self._finish(partial, final, {"shard_layout": self.shard_layout, "loop": loop})
        parallel.barrier()

    def _finish(self, partial: Path, final: Path, record: dict[str, Any]) -> None:
        """Complete a state: metrics so far, the loop's values, hashes of all files, its name."""
        if (self.work / METRICS).exists():
            shutil.copy(self.work / METRICS, partial / METRICS)
        save_file({"torch": torch.get_rng_state()}, partial / "rng.safetensors")
        files.write_json(partial / LOOP, record)
        files.write_json(partial / HASHES, provenance.file_hashes(partial))
        shutil.rmtree(final, ignore_errors=True)
        files.atomic_rename(partial, final)
        for old in self._states()[KEPT:]:
            shutil.rmtree(old)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Load the newest complete state; return its step and loop values, or None.

        Raises:
            UserError: it was saved by another number of processes or under another ZeRO stage.
        """
        path = parallel.broadcast_object(self._newest() if parallel.rank() == 0 else None)
        if path is None:
            return None
        record = json.loads((path / LOOP).read_text())
        self._check_layout(path, record["shard_layout"])
        for role, engine in self.engines.items():
            frozen = any(not p.requires_grad for p in engine.module.parameters())
            engine.load_checkpoint(str(path / role), tag="state", load_module_strict=not frozen)
        for name, tensors in self.tensors.items():
            for key, value in load_file(self._file(path, name)).items():
                tensors[key].copy_(value)
        torch.set_rng_state(load_file(path / "rng.safetensors")["torch"])
        if parallel.rank() == 0 and (path / METRICS).exists():
            shutil.copy(path / METRICS, self.work / METRICS)  # without the lines of later steps
        step = _step_of(path)
        logger.info("resumed after step %d from %s", step, path)
        return step, record["loop"]

    def _check_layout(self, path: Path, saved: dict[str, int]) -> None:
        """Refuse a state that another number of processes or another ZeRO stage has sharded."""
        if saved == self.shard_layout:
            return
        was, now = (", ".join(f"{k}: {v}" for k, v in c.items()) for c in (saved, self.shard_layout))
        raise UserError(
            f"{path} was saved with {was}; the configuration says {now}. Set it back to resume from"
            f" there, or remove {self.work} to train from the beginning."
        )

    def _file(self, state: Path, name: str) -> Path:
        number = 0 if name in self.shared else parallel.rank()
        return state / f"{name}-{number}.safetensors"

    def _newest(self) -> Path | None:
        for path in self._states():
            if _is_complete(path):
                return path
            logger.warning("%s is damaged and not used", path)
        return None

    def _states(self) -> list[Path]:
        """Return all states, the newest first."""
        return sorted(self.work.glob("step-*"), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_complete(path: Path) -> bool:
    try:
        recorded = json.loads((path / HASHES).read_text())
    except (FileNotFoundError, ValueError):
        return False
    found = provenance.file_hashes(path)
    found.pop(HASHES, None)
    return bool(recorded == found)
