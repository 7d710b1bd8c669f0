"""Where a training reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """Directories of one training."""

    data: Path  # tokenised rows of its stage
    work: Path  # the state of an unfinished training
    board: Path  # TensorBoard's files
    ptx: Path | None = None  # tokenised rows of the SFT stage; with PTX only (`ptx.Ptx`)
