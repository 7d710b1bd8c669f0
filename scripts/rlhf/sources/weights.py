"""Importing the weights of a published model: safetensors are linked, pickles are converted.

OPT's weights on the Hub are pickles (`pytorch_model*.bin`). They are read with `weights_only=True`, one
shard at a time, and no other code reads a pickle. Names and shapes of all tensors are compared with the
configuration; of safetensors only the headers are read.
"""

from __future__ import annotations

import hashlib
import json
import logging
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

from rlhf.errors import DataError, UserError, first_line
from rlhf.files import atomic_write, write_json
from rlhf.progress import progress
from rlhf.store import publishing

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SAFE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
PICKLE = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
UNUSABLE = (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError)
SHOWN = 5  # names that an error message lists


def converted_name(name: str) -> str:
    """Return the name of the safetensors that a pickle is converted to."""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def _pickle_name(converted: str) -> str:
    return converted.replace("model", "pytorch_model").replace(".safetensors", ".bin")


def choose(names: Iterable[str]) -> list[str]:
    """Return the weight files that are needed: safetensors if there are any, else pickles.

    Raises:
        UserError: shards are missing, or of two sets.
    """
    present = set(names)
    for pattern in (SAFE, PICKLE):
        files = sorted(n for n in present if pattern.fullmatch(n))
        shards = [n for n in files if "-of-" in n]
        single = [n for n in files if n not in shards]
        if single and shards:
            logger.warning("%s is used, the shards beside it (%s) are ignored", single[0], ", ".join(shards))
        if files:
            return single or _complete_set(shards)
    return []


def _complete_set(shards: list[str]) -> list[str]:
    """Return the shards if they are one set without gaps."""
    totals = {re.sub(r"\D", "", name.split("-of-")[1]) for name in shards}
    if len(totals) > 1:
        raise UserError(f"there are shards of two sets: {', '.join(shards)}: remove those of one")
    total = int(totals.pop())
    if len(shards) < total:
        before, first, after = re.split(r"(\d+)(?=-of-)", shards[0])
        names = (f"{before}{number:0{len(first)}}{after}" for number in range(1, total + 1))
        missing = _listed([name for name in names if name not in shards])
        raise UserError(
            f"the weights lack {missing}, and have {', '.join(shards[:SHOWN])}: download or copy all {total}"
            " shards again"
        )
    return shards


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def import_weights(source: Path, out: Path, work: Path, ours: bool) -> None:
    """Write the weights of a published model to `out`, as safetensors.

    Args:
        work: directory of converted shards until they are published; an interrupted conversion resumes.
        ours: the files in `source` are ours: pickles are deleted once they are converted, safetensors are
            linked.

    Raises:
        DataError: the weights do not match the configuration.
        UserError: a pickle contains anything except tensors, or there are no weights.
    """
    converted = {_pickle_name(p.name) for p in work.glob("*.safetensors")}
    chosen = choose(converted | {p.name for p in source.iterdir()})
    if not chosen:
        raise UserError(f"{source} has no model*.safetensors and no pytorch_model*.bin: choose another model")
    conversion = Conversion.of(source)
    if PICKLE.fullmatch(chosen[0]):
        shards = _convert_all(conversion, chosen, work, ours)
    else:
        shards = [source / name for name in chosen]
    conversion.check(shards)
    for shard in shards:
        publishing.add_file(shard, out / shard.name, ours or shard.parent == work)
    _write_index(shards, out)


def _convert_all(conversion: Conversion, names: list[str], work: Path, ours: bool) -> list[Path]:
    """Convert pickles that are not converted yet; return the safetensors of all."""
    work.mkdir(parents=True, exist_ok=True)
    for name in progress(names, "weights", unit="file"):
        target = work / converted_name(name)
        if not target.exists():
            conversion.convert(conversion.source / name, target)
        if ours:
            (conversion.source / name).unlink(missing_ok=True)
    return [work / converted_name(name) for name in names]


def read_config(source: Path) -> Any:
    """Return a published model's configuration, without running code of the model.

    Raises:
        DataError: it is damaged, or `transformers` does not know the model's family.
    """
    with _refused_if_unusable(source):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


@contextmanager
def _refused_if_unusable(source: Path) -> Iterator[None]:
    """Turn errors of `transformers` about a configuration into a DataError."""
    try:
        yield
    except UNUSABLE as error:
        raise DataError(
            f"{source}/config.json cannot be used ({first_line(error)}): download or copy it again if it is"
            f" damaged, or choose a causal language model that transformers {transformers.__version__} has;"
            " code of a model is not run"
        ) from None


@dataclass
class Conversion:
    """The tensors that a configuration requires, and how a checkpoint's names map to theirs."""

    source: Path
    shapes: dict[str, list[int]]  # of every tensor of the model, also of tied ones
    tied: dict[str, str]  # name of a tied tensor -> name of the tensor that it shares
    ignored: list[str]  # patterns of checkpoint names that the model class ignores
    prefix: str  # of the base model's names within the model

    @staticmethod
    def of(source: Path) -> Conversion:
        """Return the conversion for the configuration in `source`.

        Raises:
            DataError: as `read_config`.
        """
        config = read_config(source)
        # Tensors on the meta device have shapes and no memory.
        with torch.device("meta"), _refused_if_unusable(source):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        tied = dict(model.all_tied_weights_keys) if config.tie_word_embeddings else {}
        ignored = list(model._keys_to_ignore_on_load_unexpected or [])
        return Conversion(source, shapes, tied, ignored, model.base_model_prefix)

    def name(self, key: str, shape: list[int], path: Path) -> str | None:
        """Return the model's name for the tensor `key` of a checkpoint, or None if the model ignores it.

        Raises:
            DataError: the model has no such tensor, or one of another shape.
        """
        for name in (key, f"{self.prefix}.{key}", key.removeprefix(f"{self.prefix}.")):
            if self.shapes.get(name) == shape:
                return name
            if name in self.shapes:
                raise DataError(f"{path}: {key} has shape {shape}, config.json says {self.shapes[name]}")
        if any(re.search(pattern, key) for pattern in self.ignored) or key.endswith("rotary_emb.inv_freq"):
            logger.info("%s is a constant that the model computes itself; left out", key)
            return None
        raise DataError(
            f"{self.source}: the checkpoint has {key}, which config.json does not describe: check that they"
            " belong together"
        )

    def convert(self, path: Path, target: Path) -> None:
        """Write one pickled shard as safetensors, without copies of tied tensors.

        The header has the digests of the copies, so that `check` can compare them.

        Raises:
            DataError: as `name`.
            UserError: the pickle contains anything except tensors.
        """
        tensors: dict[str, torch.Tensor] = {}
        copies: dict[str, str] = {}
        for key, tensor in _read_pickle(path).items():
            if (name := self.name(key, list(tensor.shape), path)) is None:
                continue
            if name in self.tied:
                copies[name] = _tensor_digest(tensor)
            else:
                tensors[name] = tensor.contiguous()
        with atomic_write(target) as partial:
            save_file(tensors, partial, metadata={"format": "pt", "tied": json.dumps(copies)})

    def check(self, shards: list[Path]) -> None:
        """Check that the shards contain every tensor once, and that tied copies equal their originals.

        Raises:
            DataError: they do not; the text names the tensors.
        """
        locations: dict[str, tuple[Path, str]] = {}  # name -> its shard, and its key there
        copies: dict[str, str] = {}  # tied name -> digest of its copy
        for shard in shards:
            for name, key in self._header(shard, copies):
                if name in locations:
                    both = f"{locations[name][0].name} and {shard.name}"
                    raise DataError(f"{self.source}: {both} both contain {name}: remove one of them")
                locations[name] = shard, key
        if missing := sorted(self.shapes.keys() - locations.keys() - self.tied.keys()):
            raise DataError(
                f"{self.source}: the checkpoint lacks {_listed(missing)}, which config.json describes: check"
                " that they belong together"
            )
        for name, digest in copies.items():
            original = self.tied[name]
            shard, key = locations[original]
            with safe_open(shard, "pt") as file:
                if _tensor_digest(file.get_tensor(key)) != digest:
                    raise DataError(
                        f"{self.source}: config.json ties {name} to {original}, but they differ in the"
                        " checkpoint: correct tie_word_embeddings, or choose another model"
                    )

    def _header(self, shard: Path, copies: dict[str, str]) -> Iterator[tuple[str, str]]:
        """Yield (the model's name, the shard's key) of its tensors; add digests of tied ones to `copies`."""
        try:
            with safe_open(shard, "pt") as file:
                copies |= json.loads((file.metadata() or {}).get("tied", "{}"))
                for key in file.keys():  # noqa: SIM118 - the file is not a mapping
                    name = self.name(key, file.get_slice(key).get_shape(), shard)
                    if name in self.tied:
                        copies[name] = _tensor_digest(file.get_tensor(key))
                    elif name:
                        yield name, key
        except SafetensorError as error:
            raise DataError(f"{shard} is damaged ({error}): download or copy it again") from None


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return name -> tensor of a pickled checkpoint, without running code in it.

    Raises:
        UserError: it contains anything except named tensors.
    """
    mapped = zipfile.is_zipfile(path)  # torch cannot map the older format, so memory must hold it all
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # torch's message recommends to load it unsafely. Ours has only the name that it refused.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        problem = f"it imports {refused[1]}" if refused else "it is damaged, or not a pickle of tensors"
        raise UserError(
            f"{path} is refused: {problem}; none of its code was run. Use a model that is published as"
            " safetensors."
        ) from None
    if not isinstance(checkpoint, dict) or not all(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        raise UserError(
            f"{path} is refused: it should contain named tensors and nothing else. Use a model that is"
            " published as safetensors."
        )
    return checkpoint


def _tensor_digest(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's bytes, of any shape and dtype."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _write_index(shards: list[Path], out: Path) -> None:
    """Write the index of several shards, as `transformers` reads it."""
    if len(shards) == 1:
        return
    weight_map: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), shard.name)
    total = sum(shard.stat().st_size for shard in shards)
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
