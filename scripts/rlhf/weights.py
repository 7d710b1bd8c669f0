"""A published model's weights, as safetensors: linked where they are, converted from pickles.

OPT's weights on the Hub are pickles (`pytorch_model*.bin`). They are read with `weights_only=True`,
one shard at a time, every tensor is checked against the configuration, and nothing downstream ever
reads a pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf import store
from rlhf.errors import DataError, UserError
from rlhf.progress import progress

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SAFE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
PICKLE = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
TOLD = 5  # names that an error message lists


def converted_name(name: str) -> str:
    """Return what a pickle's safetensors are called."""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def choose(names: Iterable[str]) -> list[str]:
    """Return the weight files that are needed: safetensors where there are some, else pickles."""
    present = set(names)
    for pattern in (SAFE, PICKLE):
        found = sorted(n for n in present if pattern.fullmatch(n))
        shards = [n for n in found if "-of-" in n]
        if found:
            whole = [n for n in found if n not in shards]
            return whole or shards + [i for i in (INDEX,) if i in present and pattern is SAFE]
    return []


def bring(source: Path, out: Path, work: Path, ours: bool) -> None:
    """Put the weights of a published model into `out` as safetensors.

    Args:
        work: where converted shards lie until they are published; they outlive the process.
        ours: pickles in `source` go as soon as they are converted.

    Raises:
        DataError: they do not fit the configuration.
        UserError: a pickle holds anything but tensors, or there are no weights.
    """
    names = {p.name for p in [*source.iterdir(), *work.glob("*.safetensors")]}
    safe = [n for n in choose(names) if SAFE.fullmatch(n) or n == INDEX]
    if not safe or (work / safe[0]).exists():
        return _convert_all(source, out, work, ours)
    for name in safe:
        store.link_or_copy(source / name, out / name)
    return None


def _convert_all(source: Path, out: Path, work: Path, ours: bool) -> None:
    conversion = Conversion.of(source)
    work.mkdir(parents=True, exist_ok=True)
    for path in progress(
        sorted(p for p in source.iterdir() if PICKLE.fullmatch(p.name)), "weights", unit="file"
    ):
        target = work / converted_name(path.name)
        if not target.exists():
            conversion.convert(path, target)
        if ours:
            path.unlink()
    shards = sorted(work.glob("*.safetensors"))
    if not shards:
        raise UserError(f"{source} holds no model*.safetensors and no pytorch_model*.bin")
    conversion.check(shards)
    for shard in shards:
        store.link_or_copy(shard, out / shard.name)
    _write_index(shards, out)


@dataclass
class Conversion:
    """The tensors that a configuration asks for, and how a checkpoint's names become theirs."""

    source: Path
    shapes: dict[str, list[int]]  # of every tensor of the model, tied ones too
    tied: dict[str, str]  # a tensor that is another one's -> that one
    ignored: list[str]  # patterns of names that the model class knows and does not want
    prefix: str

    @staticmethod
    def of(source: Path) -> Conversion:
        """Read a model's configuration; no weight is made."""
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        tied = dict(model.all_tied_weights_keys) if config.tie_word_embeddings else {}
        ignored = list(model._keys_to_ignore_on_load_unexpected or [])
        return Conversion(source, shapes, tied, ignored, model.base_model_prefix)

    def name(self, key: str) -> str | None:
        """Return the model's name of a checkpoint's tensor; None for one that is not wanted.

        Raises:
            DataError: the model has no such tensor.
        """
        for name in (key, f"{self.prefix}.{key}", key.removeprefix(f"{self.prefix}.")):
            if name in self.shapes:
                return name
        if any(re.search(pattern, key) for pattern in self.ignored) or key.endswith("rotary_emb.inv_freq"):
            logger.info("%s is a constant that the model makes itself; left out", key)
            return None
        raise DataError(f"{self.source}: the checkpoint has {key}, of which config.json knows nothing")

    def convert(self, path: Path, target: Path) -> None:
        """Write one pickled shard as safetensors, with the digests of tied copies in its header."""
        tensors: dict[str, torch.Tensor] = {}
        copies: dict[str, str] = {}
        for key, tensor in _read_pickle(path).items():
            if (name := self.name(key)) is None:
                continue
            if list(tensor.shape) != self.shapes[name]:
                raise DataError(
                    f"{path}: {key} has shape {list(tensor.shape)}, config.json says {self.shapes[name]}"
                )
            if name in self.tied:
                copies[name] = _tensor_digest(tensor)
            else:
                tensors[name] = tensor.contiguous()
        draft = target.with_suffix(".partial")
        save_file(tensors, draft, metadata={"format": "pt", "tied": json.dumps(copies)})
        os.rename(draft, target)

    def check(self, shards: list[Path]) -> None:
        """Check that the shards hold every tensor once, and tied copies equal their originals.

        Raises:
            DataError: they do not; names are told.
        """
        where: dict[str, Path] = {}
        copies: dict[str, str] = {}
        for shard in shards:
            with safe_open(shard, "pt") as file:
                where |= dict.fromkeys(file.keys(), shard)
                copies |= json.loads(file.metadata()["tied"])
        if missing := sorted(self.shapes.keys() - where.keys() - self.tied.keys()):
            more = f" and {len(missing) - TOLD} more" if len(missing) > TOLD else ""
            raise DataError(f"{self.source}: the checkpoint lacks {', '.join(missing[:TOLD])}{more}")
        for name, digest in copies.items():
            original = self.tied[name]
            with safe_open(where[original], "pt") as file:
                if _tensor_digest(file.get_tensor(original)) != digest:
                    raise DataError(
                        f"{self.source}: config.json ties {name} to {original}, the checkpoint's differ"
                    )


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Read a pickled checkpoint that holds tensors by name and nothing else.

    Raises:
        UserError: it holds anything else. Nothing of it is run.
    """
    mapped = zipfile.is_zipfile(path)  # the older format cannot be mapped and is read whole
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # torch's own text advises to read it without care: only the name it stumbled over is told.
        wants = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {wants[1]}" if wants else "it is damaged, or no pickle of tensors"
        raise UserError(
            f"{path} is refused: {what}; nothing of it was run. Use a model that is published as safetensors."
        ) from None
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise UserError(f"{path} is refused: it should hold tensors by name and nothing else")
    return found


def _tensor_digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()


def _write_index(shards: list[Path], out: Path) -> None:
    if len(shards) == 1:
        return
    weight_map: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), shard.name)
    total = sum(shard.stat().st_size for shard in shards)
    store.write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
