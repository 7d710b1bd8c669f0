"""A published model's weights, as safetensors: linked where they are, converted from pickles.

OPT's weights on the Hub are pickles (`pytorch_model*.bin`). They are read with `weights_only=True`,
one shard at a time, and nothing downstream ever reads a pickle. Every tensor of either kind is
checked against the configuration, safetensors by their headers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf import store
from rlhf.errors import DataError, UserError, first_line
from rlhf.progress import progress

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SAFE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
PICKLE = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
UNUSABLE = (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError)
TOLD = 5  # names that an error message lists


def converted_name(name: str) -> str:
    """Return what a pickle's safetensors are called."""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _pickle_name(converted: str) -> str:
    return converted.replace("model", "pytorch_model").replace(".safetensors", ".bin")


def choose(names: Iterable[str]) -> list[str]:
    """Return the weight files that are needed: safetensors where there are some, else pickles.

    Raises:
        UserError: shards are missing.
    """
    present = set(names)
    for pattern in (SAFE, PICKLE):
        found = sorted(n for n in present if pattern.fullmatch(n))
        shards = [n for n in found if "-of-" in n]
        whole = [n for n in found if n not in shards]
        if whole and shards:
            logger.warning("%s is taken, the shards beside it (%s) are left out", whole[0], ", ".join(shards))
        if found:
            return whole or _all_of(shards)
    return []


def _all_of(shards: list[str]) -> list[str]:
    """Return the shards if they are one set, and whole."""
    totals = {re.sub(r"\D", "", name.split("-of-")[1]) for name in shards}
    if len(totals) > 1:
        raise UserError(f"shards of two sets lie side by side: {', '.join(shards)}; remove those of one")
    number = re.compile(r"\d+(?=-of-)")
    first, total = shards[0], int(totals.pop())
    every = (number.sub(str(i + 1).zfill(len(number.search(first)[0])), first) for i in range(total))  # type: ignore[index]
    if len(shards) < total:
        missing = _listed([name for name in every if name not in shards])
        raise UserError(
            f"the weights lack {missing}, and have {', '.join(shards[:TOLD])}: bring all {total} shards from"
            " where the model was published"
        )
    return shards


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
    return ", ".join(names[:TOLD]) + more


def bring(source: Path, out: Path, work: Path, ours: bool) -> None:
    """Put the weights of a published model into `out` as safetensors.

    Args:
        work: where converted shards lie until they are published; they outlive the process.
        ours: `source` may be used up: pickles go as soon as they are converted, weights are linked.

    Raises:
        DataError: they do not fit the configuration.
        UserError: a pickle holds anything but tensors, or there are no weights.
    """
    done = {_pickle_name(p.name) for p in work.glob("*.safetensors")}
    chosen = choose(done | {p.name for p in source.iterdir()})
    if not chosen:
        raise UserError(f"{source} holds no model*.safetensors and no pytorch_model*.bin")
    conversion = Conversion.of(source)
    if PICKLE.fullmatch(chosen[0]):
        shards = _convert_all(conversion, chosen, work, ours)
    else:
        shards = [source / name for name in chosen]
    conversion.check(shards)
    for shard in shards:
        store.take(shard, out / shard.name, ours or shard.parent == work)
    _write_index(shards, out)


def _convert_all(conversion: Conversion, names: list[str], work: Path, ours: bool) -> list[Path]:
    work.mkdir(parents=True, exist_ok=True)
    for name in progress(names, "weights", unit="file"):
        target = work / converted_name(name)
        if not target.exists():
            conversion.convert(conversion.source / name, target)
        if ours:
            (conversion.source / name).unlink(missing_ok=True)
    return [work / converted_name(name) for name in names]


def read_config(source: Path) -> Any:
    """Return a published model's configuration; no code of its own is run.

    Raises:
        DataError: it is damaged, or of a kind that `transformers` does not have.
    """
    with _understood(source):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


@contextmanager
def _understood(source: Path) -> Iterator[None]:
    try:
        yield
    except UNUSABLE as error:
        raise DataError(
            f"{source}/config.json cannot be used ({first_line(error)}): bring it again if it is damaged, or choose a causal"
            f" language model that transformers {transformers.__version__} has; a model's own code is not run"
        ) from None


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
        config = read_config(source)
        with torch.device("meta"), _understood(source):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        tied = dict(model.all_tied_weights_keys) if config.tie_word_embeddings else {}
        ignored = list(model._keys_to_ignore_on_load_unexpected or [])
        return Conversion(source, shapes, tied, ignored, model.base_model_prefix)

    def name(self, key: str, shape: list[int], path: Path) -> str | None:
        """Return the model's name of a checkpoint's tensor; None for one that is not wanted.

        Raises:
            DataError: the model has no such tensor, or one of another shape.
        """
        for name in (key, f"{self.prefix}.{key}", key.removeprefix(f"{self.prefix}.")):
            if self.shapes.get(name) == shape:
                return name
            if name in self.shapes:
                raise DataError(f"{path}: {key} has shape {shape}, config.json says {self.shapes[name]}")
        if any(re.search(pattern, key) for pattern in self.ignored) or key.endswith("rotary_emb.inv_freq"):
            logger.info("%s is a constant that the model makes itself; left out", key)
            return None
        raise DataError(f"{self.source}: the checkpoint has {key}, of which config.json knows nothing")

    def convert(self, path: Path, target: Path) -> None:
        """Write one pickled shard as safetensors, with the digests of tied copies in its header."""
        tensors: dict[str, torch.Tensor] = {}
        copies: dict[str, str] = {}
        for key, tensor in _read_pickle(path).items():
            if (name := self.name(key, list(tensor.shape), path)) is None:
                continue
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
        where: dict[str, tuple[Path, str]] = {}
        copies: dict[str, str] = {}
        for shard in shards:
            for name, key in self._header(shard, copies):
                if name in where:
                    raise DataError(f"{self.source}: {where[name][0].name} and {shard.name} both hold {name}")
                where[name] = shard, key
        if missing := sorted(self.shapes.keys() - where.keys() - self.tied.keys()):
            raise DataError(f"{self.source}: the checkpoint lacks {_listed(missing)}")
        for name, digest in copies.items():
            original = self.tied[name]
            shard, key = where[original]
            with safe_open(shard, "pt") as file:
                if _tensor_digest(file.get_tensor(key)) != digest:
                    raise DataError(
                        f"{self.source}: config.json ties {name} to {original}, the checkpoint's differ"
                    )

    def _header(self, shard: Path, copies: dict[str, str]) -> Iterator[tuple[str, str]]:
        """Yield (the model's name, the shard's) of its tensors; add digests of tied ones to `copies`."""
        try:
            with safe_open(shard, "pt") as file:
                copies |= json.loads((file.metadata() or {}).get("tied", "{}"))
                for key in file.keys():  # noqa: SIM118 - the file is no mapping
                    name = self.name(key, file.get_slice(key).get_shape(), shard)
                    if name in self.tied:
                        copies[name] = _tensor_digest(file.get_tensor(key))
                    elif name:
                        yield name, key
        except SafetensorError as error:
            raise DataError(f"{shard} is damaged ({error}): bring it again") from None


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
