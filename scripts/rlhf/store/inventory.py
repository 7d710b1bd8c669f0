"""The artefacts of a volume: listing, comparing, adopting and removing them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.config.stages import STAGES
from rlhf.errors import DataError, UserError
from rlhf.store import layout, provenance, publishing
from rlhf.store.plan import Artefact, Plan
from rlhf.store.workdir import is_held

PATTERNS = ("models/*/*", "datasets/*/*", "store/*/*")  # of artefacts
YOUNG = 3600.0  # seconds since the last write, within which a draft may still be in use


class Volume:
    """The artefacts below `root`, compared with the plan of the current configuration and code."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root, self.plan = root, plan

    def present(self) -> list[Path]:
        """Return all complete artefacts."""
        paths = (path for pattern in PATTERNS for path in sorted(self.root.glob(pattern)))
        return [path for path in paths if _is_complete(path)]

    def incomplete(self) -> list[Path]:
        """Return artefacts without a provenance.

        A user may keep any directory below models/ and datasets/, so only planned artefacts count there.
        """
        paths = (path for pattern in PATTERNS for path in sorted(self.root.glob(pattern)) if path.is_dir())
        return [
            path
            for path in paths
            if not _is_draft(path)
            and not _is_complete(path)
            and (path.is_relative_to(self.root / "store") or str(path) in self.plan.artefacts)
        ]

    def names(self) -> dict[Path, list[str]]:
        """Return artefact -> names under `results/` that link into it."""
        names: dict[Path, list[str]] = {}
        for link in sorted((self.root / "results").rglob("*")):
            if link.is_symlink() and (artefact := self._artefact_of(link)):
                names.setdefault(artefact, []).append(link.relative_to(self.root).as_posix())
        return names

    def _artefact_of(self, link: Path) -> Path | None:
        """Return the artefact of this volume that a link points into, or None."""
        root, real = self.root.resolve(), link.resolve()
        if not (real.exists() and real.is_relative_to(root)):
            return None
        try:
            return provenance.parent_of(real).relative_to(root)
        except DataError:
            return None

    def listing(self) -> list[str]:
        """Return a line for each artefact: size, age, path, names under `results/`."""
        names, now = self.names(), time.time()
        return [
            f"{human(size(path)):>10}  {age(now - (path / provenance.PROVENANCE).stat().st_mtime):>8}  {path}"
            + "".join(f"\n{'':22}<- {name}" for name in names.get(path, []))
            for path in self.present()
        ]

    def find(self, name: str) -> Path:
        """Return the artefact that a name, path or key means; a planned one need not exist.

        Raises:
            UserError: no artefact, or more than one, is meant.
        """
        name = name.rstrip("/")
        if name in self.plan.results:
            return Path(self.plan.artefact_of(name).path)
        if (self.root / name).is_symlink() and (linked := self._artefact_of(self.root / name)):
            return linked  # a result of a scenario that this configuration does not have
        known = {*map(str, self.present()), *self.plan.artefacts}
        matches = sorted(path for path in known if path == name or path.endswith(name))
        if len(matches) == 1:
            return Path(matches[0])
        scenario = f"results/{name.removeprefix('results/')}/"
        if results := [result for result in self.plan.results if result.startswith(scenario)]:
            raise UserError(f"{name!r} is a scenario: name one of {', '.join(results)}")
        several = ", ".join(matches[:4]) + (f" and {len(matches) - 4} more" if len(matches) > 4 else "")
        raise UserError(f"{name!r} {f'may mean {several}' if matches else 'names no artefact'}; see `ls`")

    def record(self, path: Path) -> dict[str, Any]:
        """Return an artefact's inputs: its provenance, or the planned spec of one that does not exist."""
        if _is_complete(path):
            return provenance.read(path)
        return self.plan.artefacts[str(path)].spec

    def why(self, name: str) -> list[str]:
        """Say how an artefact differs from the most similar one of the same stage, line by line."""
        path = self.find(name)
        stage = self.record(path)["stage"]
        lines = [f"{path} {'exists' if path.exists() else 'is missing'}"]
        others = [p for p in self.present() if p != path and self.record(p)["stage"] == stage]
        if not others:
            return [*lines, f"there is no other {stage} artefact"]
        differing = {other: self._differing(path, other) for other in others}
        nearest = min(others, key=lambda other: len(differing[other]))
        return [*lines, f"it differs from {nearest} in:", *(f"  {text}" for text in differing[nearest])]

    def _differing(self, mine: Path, other: Path) -> list[str]:
        """Say how two artefacts differ: their own values, their code, their parents; each difference once."""
        a, b = self.record(mine), self.record(other)
        stage, ours, theirs = a["stage"], flat(a["config"]), flat(b["config"])
        lines = [
            f"{stage}.{key}: {ours.get(key)!r}, there {theirs.get(key)!r}"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]
        lines += [] if a["code"] == b["code"] else [f"the code that makes {stage}"]
        for role in sorted({*a["parents"], *b["parents"]}):
            one, two = a["parents"].get(role), b["parents"].get(role)
            if one and two and self._is_known(one) and self._is_known(two):
                lines += self._differing(Path(one), Path(two)) if one != two else []
            elif one != two:
                lines.append(f"{role} of {stage}: {one}, there {two}")
        return list(dict.fromkeys(lines))

    def _is_known(self, path: str) -> bool:
        return path in self.plan.artefacts or _is_complete(Path(path))

    def adopt(self, name: str) -> list[str]:
        """Publish an existing artefact and its ancestors again, under the names that the current code gives.

        Raises:
            UserError: a missing artefact has no counterpart that differs in its code only.
        """
        lines: list[str] = []
        target = self.plan.artefacts.get(str(self.find(name)))
        if target is None:
            raise UserError(f"{name} is not part of the plan of the current configuration and code: see `ls`")
        for artefact in self._lineage(target):
            if not Path(artefact.path).exists():
                counterpart = self._counterpart(artefact)
                _copy(counterpart, artefact)
                lines.append(f"{artefact.path} adopted from {counterpart}")
        return lines or [f"{target.path} and the artefacts that it is built from exist already"]

    def _lineage(self, artefact: Artefact) -> list[Artefact]:
        """Return all artefacts that one is built from, parents first, and itself."""
        ancestors: dict[str, Artefact] = {}
        for parent in artefact.parents.values():
            ancestors |= {a.path: a for a in self._lineage(self.plan.artefacts[parent])}
        return [*ancestors.values(), artefact]

    def _counterpart(self, artefact: Artefact) -> Path:
        """Return the newest artefact that differs only in its code, or in that of its parents."""
        for path in sorted(self.present(), key=lambda p: -(p / provenance.PROVENANCE).stat().st_mtime):
            record = provenance.read(path)
            same = record["stage"] == artefact.stage and record["config"] == artefact.spec["config"]
            if (
                same
                and record["parents"].keys() == artefact.parents.keys()
                and all(
                    self._is_adopted(artefact.parents[role], old) for role, old in record["parents"].items()
                )
            ):
                return path
        raise UserError(f"nothing to adopt as {artefact.path}: no artefact differs in its code only")

    def _is_adopted(self, new: str, old: str) -> bool:
        return new == old or old in provenance.read(self.root / new).get("adopted_from", [])

    def unused(self) -> list[Path]:
        """Return what can be removed: artefacts that nothing needs, and abandoned work.

        Results and the plan need artefacts and everything that these are built from.
        """
        used: set[Path] = set()
        waiting = [*self.names(), *map(Path, self.plan.artefacts)]
        while waiting:
            path = waiting.pop()
            # A parent may have been removed by hand; its children stay in use.
            if path not in used and _is_complete(path):
                used.add(path)
                waiting += [Path(p) for p in provenance.read(path)["parents"].values()]
        return [path for path in self.present() if path not in used] + self._abandoned_work()

    def _abandoned_work(self) -> list[Path]:
        """Return work directories and drafts of artefacts that are published or not planned.

        Those in use stay: another configuration may plan the artefact. A young draft counts as in use,
        because jobs for data, responses and built-in sources hold no work directory.
        """
        return [
            work
            for artefact, work in self._work()
            if (_is_complete(artefact) or str(artefact) not in self.plan.artefacts)
            and not self._is_in_use(work)
        ]

    def _is_in_use(self, path: Path) -> bool:
        """Return whether a process may be using a work directory or draft now."""
        relative = path.relative_to(self.root)
        if relative.parts[0] == "work":
            return is_held(path)
        if not _is_draft(relative):
            return False
        work = self.root / layout.work_of(_artefact_of_draft(relative))
        return is_held(work) or time.time() - newest(path) < YOUNG

    def _work(self) -> list[tuple[Path, Path]]:
        """Return (artefact, its work directory or draft) for all unfinished work."""
        downloads = [
            (Path(*w.parts[1:]), w)
            for sources in ("models", "datasets")
            for w in self.root.glob(f"work/{sources}/*/*")
        ]
        states = [
            (Path("store", *w.parts[1:]), w) for stage in STAGES for w in self.root.glob(f"work/{stage}/*")
        ]
        drafts = [
            (_artefact_of_draft(p), p)
            for pattern in PATTERNS
            for p in self.root.glob(pattern.removesuffix("*") + ".*.partial")
        ]
        return sorted(downloads + states + drafts)

    def describe(self, path: Path) -> str:
        """Return a line about what can be removed: size, path, and the last saved step of a training."""
        steps = [
            int(step.name.removeprefix("step-")) for step in path.glob("step-*") if step.name[5:].isdigit()
        ]
        state = f"  an unfinished training, saved at step {max(steps)}" if steps else ""
        return f"{human(size(path)):>9}  {path}{state}"

    def remove(self, paths: Iterable[Path]) -> list[Path]:
        """Remove directories; return those that are now in use or that another process has removed."""
        kept = []
        for path in paths:
            if not path.exists() or self._is_in_use(path):
                kept.append(path)
            else:
                shutil.rmtree(path)
        return kept


def _is_complete(path: Path) -> bool:
    return (path / provenance.PROVENANCE).exists()


def _is_draft(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def _artefact_of_draft(path: Path) -> Path:
    return path.parent / path.name[1:].removesuffix(".partial")


def _copy(source: Path, artefact: Artefact) -> None:
    """Publish `source` again under the name of `artefact`, with hard links if the volume supports them."""
    if damage := provenance.differences(source):
        raise UserError(f"{source} is damaged and cannot be adopted: {'; '.join(damage)}")
    old = provenance.read(source)
    record: dict[str, Any] = {
        **artefact.spec,
        **{k: old[k] for k in ("metrics", "versions") if k in old},
        "adopted_from": [*old.get("adopted_from", []), str(source)],
    }
    with publishing.publish(Path(artefact.path), record) as draft:
        draft.run |= json.loads((source / provenance.RUN).read_text())
        for name in old["files"]:
            publishing.link_or_copy(source / name, draft.path / name)


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return dotted name -> value for the leaves of a tree."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return leaves


def differences(path: Path) -> list[str]:
    """Return how an artefact differs from its provenance, also if that is missing or damaged."""
    try:
        return provenance.differences(path)
    except DataError as error:
        return [str(error)]


def size(path: Path) -> int:
    """Return the bytes of all files below a directory."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def newest(path: Path) -> float:
    """Return when something in a directory was last written, in seconds since the epoch; 0 if it is gone."""
    times = []
    for entry in [path, *path.rglob("*")]:
        with suppress(FileNotFoundError):  # its writer may rename it meanwhile
            times.append(entry.lstat().st_mtime)
    return max(times, default=0.0)


def age(seconds: float) -> str:
    """Return a duration as text."""
    for unit, length in (("d", 86400), ("h", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 60:.0f} min"


def human(size_bytes: float) -> str:
    """Return a size as text, with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
