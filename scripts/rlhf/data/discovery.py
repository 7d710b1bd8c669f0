"""Which files of a dataset hold the rows of a split.

The card decides, if the dataset has one with `configs` (as the Hub's cards do). Otherwise names decide: a file
belongs to the split that is a word of its path, such as `data/train-00000.parquet`, to "train" where no file
names a split, and to the subset that is its directory. A single file is read whatever its name is.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from rlhf.config.sources import Dataset
from rlhf.errors import DataError, one_line
from rlhf.files import walk

logger = logging.getLogger(__name__)

FORMATS = (".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".arrow")
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
CARD = "README.md"
SAVED = ("dataset_dict.json", "state.json", "dataset_info.json")  # of directories that `datasets` saved
NOT_ROWS = (CARD, "dataset_infos.json", *SAVED)
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
WORDS = {word: split for split, words in SPLITS.items() for word in words}


def format_of(name: str) -> str:
    """Return the ending that says how rows are written, such as `.jsonl`, or "" if a file holds none."""
    path = PurePosixPath(name)
    endings = path.suffixes[:-1] if path.suffix.lower() in COMPRESSIONS else path.suffixes
    ending = endings[-1].lower() if endings else ""
    return ending if ending in FORMATS and path.name not in NOT_ROWS else ""


def files_of(root: Path, dataset: Dataset) -> list[Path]:
    """Return the files below `root` with the rows of the dataset's split and subset, in order.

    Raises:
        DataError: there is no such split or subset, there are several subsets and none is named, or
            the rows are there in several formats.
    """
    names = sorted(p.relative_to(root).as_posix() for p in walk(root))
    names = [n for n in names if format_of(n) and not any(part.startswith(".") for part in n.split("/"))]
    configs = _configs(root, dataset)
    if configs:
        splits = _by_card(_chosen(configs, dataset), names, dataset)
    elif len(names) == 1:
        splits = {"train": names, _split_of(names[0]) or "train": names}
    else:
        splits = _by_name(names, dataset)
    if dataset.split not in splits:
        raise DataError(
            f"{dataset.name} has no split {dataset.split!r}; there are {', '.join(sorted(splits))}: correct"
            " `split` of the dataset"
        )
    found = splits[dataset.split] if configs else _of_subset(splits[dataset.split], dataset)
    if len(formats := sorted({format_of(n) for n in found})) > 1:
        raise DataError(
            f"{dataset.name}: split {dataset.split!r} is there in several formats ({', '.join(formats)}), which may be"
            " the same rows twice: remove one, or name a single file"
        )
    return [root / name for name in found]


def _by_name(names: Sequence[str], dataset: Dataset) -> dict[str, list[str]]:
    """Return split -> files, by the words of their paths."""
    if not any(map(_split_of, names)):
        return {"train": list(names)}
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split_of(name) or "", []).append(name)
    if others := splits.pop("", []):
        logger.info("%s: left out, for no split is named in their paths: %s", dataset.name, ", ".join(others))
    return splits


def _split_of(name: str) -> str | None:
    """Return the split that a path names; the file's own name counts before its directories."""
    parts = name.lower().split("/")
    words = (word for part in reversed(parts) for word in re.split(r"[^a-z]+", part))
    return next((WORDS[word] for word in words if word in WORDS), None)


def _of_subset(names: Sequence[str], dataset: Dataset) -> list[str]:
    """Return the files of the dataset's subset: of a directory, leaving out those called after a split."""
    subsets: dict[str, list[str]] = {}
    for name in names:
        parts = [part for part in name.split("/")[:-1] if part.lower() not in {*WORDS, "data"}]
        subsets.setdefault("/".join(parts), []).append(name)
    return [name for subset in _chosen_names(subsets, dataset) for name in subsets[subset]]


def _chosen_names(subsets: Iterable[str], dataset: Dataset) -> list[str]:
    """Return the subsets that the dataset's `subset` means, a name or a pattern.

    Raises:
        DataError: none is meant, or there are several and none is named.
    """
    every = sorted(subsets)
    listed = ", ".join(subset or "(none)" for subset in every)
    if dataset.subset is None and len(every) > 1:
        raise DataError(
            f"{dataset.name} has {len(every)} subsets ({listed}): name one as `subset` of the dataset, or several by a"
            ' pattern, such as "*"'
        )
    chosen = [s for s in every if dataset.subset is None or fnmatch.fnmatchcase(s, dataset.subset)]
    if not chosen:
        raise DataError(f"{dataset.name} has no subset {dataset.subset!r}; there are {listed}")
    return chosen


def _configs(root: Path, dataset: Dataset) -> dict[str, Any]:
    """Return subset -> its `data_files`, from the front matter of the card; nothing without them."""
    card = root / CARD
    front = (
        re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(errors="replace"), re.S)
        if card.is_file()
        else None
    )
    try:
        matter = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError as error:
        raise DataError(
            f"{dataset.name}/{CARD} has front matter that is not YAML: {one_line(error)}"
        ) from error
    entries = matter.get("configs") if isinstance(matter, Mapping) else None
    entries = [e for e in entries or () if isinstance(e, Mapping) and "data_files" in e]
    return {str(e.get("config_name", "default")): e for e in entries}


def _chosen(configs: dict[str, Any], dataset: Dataset) -> list[Any]:
    """Return the `data_files` of the subsets that are meant; a default subset is meant where none is named."""
    default = next(
        (name for name, entry in configs.items() if entry.get("default") or name == "default"), None
    )
    names = [default] if dataset.subset is None and default is not None else _chosen_names(configs, dataset)
    return [configs[name]["data_files"] for name in names]


def _by_card(chosen: Sequence[Any], names: Sequence[str], dataset: Dataset) -> dict[str, list[str]]:
    """Return split -> files, from `data_files`: a pattern, several, or a list of splits with patterns.

    Raises:
        DataError: they are something else.
    """
    splits: dict[str, list[str]] = {}
    for data_files in chosen:
        entries = data_files if isinstance(data_files, list) else [data_files]
        for entry in entries:
            split, paths = (
                (entry.get("split"), entry.get("path")) if isinstance(entry, Mapping) else ("train", entry)
            )
            patterns: list[Any] = paths if isinstance(paths, list) else [paths]
            if not (split and all(isinstance(pattern, str) for pattern in patterns)):
                raise DataError(
                    f"{dataset.name}/{CARD}: `data_files` has {json.dumps(entry, default=str)}, which needs a `split` and a"
                    " `path`, or to be a pattern: correct the card, or remove its `configs`"
                )
            for pattern in patterns:
                splits.setdefault(str(split), []).extend(_matching(names, pattern))
    return {split: found for split, found in splits.items() if found}


def _matching(names: Sequence[str], pattern: str) -> list[str]:
    """Return the names that a pattern of the Hub means: `*` stays in a directory, `**` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = "".join(signs.get(part, re.escape(part)) for part in parts)
    return [name for name in names if re.fullmatch(expression, name)]
