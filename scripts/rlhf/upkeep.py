"""Looking after a volume: what lies on it, what differs, what may be adopted or removed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf import store
from rlhf.config import STAGES
from rlhf.errors import DataError, UserError
from rlhf.plan import Artefact, Plan
from rlhf.workdir import is_held

PLACES = ("models/*/*", "datasets/*/*", "store/*/*")
YOUNG = 3600.0  # seconds since something was written, within which a draft may still be written to


class Volume:
    """The artefacts below `root`, seen with the plan of the current configuration and code."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self.root, self.plan = root, plan

    def present(self) -> list[Path]:
        """Return all whole artefacts."""
        found = (path for place in PLACES for path in sorted(self.root.glob(place)))
        return [path for path in found if (path / store.PROVENANCE).exists()]

    def broken(self) -> list[Path]:
        """Return directories in an artefact's place without a provenance.

        Below models/ and datasets/ a user may keep directories of any shape: those are left out.
        """
        found = [path for place in PLACES for path in sorted(self.root.glob(place)) if path.is_dir()]
        return [
            path
            for path in found
            if not _is_draft(path)
            and not (path / store.PROVENANCE).exists()
            and (path.is_relative_to(self.root / "store") or str(path) in self.plan.artefacts)
        ]

    def names(self) -> dict[Path, list[str]]:
        """Return artefact -> names under `results/` that lead into it."""
        names: dict[Path, list[str]] = {}
        for link in sorted((self.root / "results").rglob("*")):
            if link.is_symlink() and (artefact := self._artefact_of(link)):
                names.setdefault(artefact, []).append(link.relative_to(self.root).as_posix())
        return names

    def _artefact_of(self, link: Path) -> Path | None:
        """Return the artefact of this volume that a link leads into, if it leads into one."""
        root, real = self.root.resolve(), link.resolve()
        if not (real.exists() and real.is_relative_to(root)):
            return None
        try:
            return store.parent_of(real).relative_to(root)
        except DataError:
            return None

    def listing(self) -> list[str]:
        """Return one line per artefact: size, age, path, names."""
        names, now = self.names(), time.time()
        return [
            f"{human(size(path)):>10}  {age(now - (path / store.PROVENANCE).stat().st_mtime):>8}  {path}"
            + "".join(f"\n{'':22}<- {name}" for name in names.get(path, []))
            for path in self.present()
        ]

    def find(self, name: str) -> Path:
        """Return the artefact of a name, path or key; it need not exist if it is planned.

        Raises:
            UserError: nothing, or more than one, is meant.
        """
        wanted = name.rstrip("/")
        if wanted in self.plan.results:
            return Path(self.plan.artefact_of(wanted).path)
        if (self.root / wanted).is_symlink() and (linked := self._artefact_of(self.root / wanted)):
            return linked  # of a scenario that this configuration does not have
        known = {*map(str, self.present()), *self.plan.artefacts}
        meant = sorted(path for path in known if path == wanted or path.endswith(wanted))
        if len(meant) == 1:
            return Path(meant[0])
        theirs = [result for result in self.plan.results if result.startswith(f"results/{_bare(wanted)}/")]
        if theirs:
            raise UserError(f"{name!r} is a scenario: name one of {', '.join(theirs)}")
        several = ", ".join(meant[:4]) + (f" and {len(meant) - 4} more" if len(meant) > 4 else "")
        raise UserError(f"{name!r} {f'may mean {several}' if meant else 'names no artefact'}; see `ls`")

    def record(self, path: Path) -> dict[str, Any]:
        """Return what an artefact is made of: its provenance, or the plan's word."""
        if (path / store.PROVENANCE).exists():
            return store.read_provenance(path)
        return self.plan.artefacts[str(path)].spec

    def why(self, name: str) -> list[str]:
        """Say what differs between an artefact and its nearest relative of the same stage."""
        path = self.find(name)
        stage = self.record(path)["stage"]
        lines = [f"{path} {'is there' if path.exists() else 'is missing'}"]
        others = [p for p in self.present() if p != path and self.record(p)["stage"] == stage]
        if not others:
            return [*lines, f"there is no other {stage} artefact"]
        told = {other: self._differing(path, other) for other in others}
        nearest = min(others, key=lambda other: len(told[other]))
        return [*lines, f"from {nearest} it differs in:", *(f"  {text}" for text in told[nearest])]

    def _differing(self, mine: Path, other: Path) -> list[str]:
        """Say how two artefacts differ: values of their own, code, and what they are made from; each once."""
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
        return path in self.plan.artefacts or Path(path, store.PROVENANCE).exists()

    def adopt(self, name: str) -> list[str]:
        """Give an existing artefact, and what it is made from, the name that the current code asks for.

        Raises:
            UserError: no artefact differs from a missing one in its code alone.
        """
        lines: list[str] = []
        target = self.plan.artefacts.get(str(self.find(name)))
        if target is None:
            raise UserError(f"{name} is not what the current configuration and code ask for")
        for artefact in self._ancestors(target):
            if not Path(artefact.path).exists():
                relative = self._relative(artefact)
                _copy(relative, artefact)
                lines.append(f"{artefact.path} adopted from {relative}")
        return lines or [f"{target.path} and what it is made from are there already"]

    def _ancestors(self, artefact: Artefact) -> list[Artefact]:
        """Return an artefact and all it is made from, parents first."""
        found: dict[str, Artefact] = {}
        for parent in artefact.parents.values():
            found |= {a.path: a for a in self._ancestors(self.plan.artefacts[parent])}
        return [*found.values(), artefact]

    def _relative(self, artefact: Artefact) -> Path:
        """Return the newest artefact that differs in its code, or its parents', alone."""
        for path in sorted(self.present(), key=lambda p: -(p / store.PROVENANCE).stat().st_mtime):
            record = store.read_provenance(path)
            same = record["stage"] == artefact.stage and record["config"] == artefact.spec["config"]
            if (
                same
                and record["parents"].keys() == artefact.parents.keys()
                and all(
                    self._is_adopted(artefact.parents[role], old) for role, old in record["parents"].items()
                )
            ):
                return path
        raise UserError(f"nothing to adopt as {artefact.path}: no artefact differs in its code alone")

    def _is_adopted(self, new: str, old: str) -> bool:
        return new == old or old in store.read_provenance(self.root / new).get("adopted_from", [])

    def unused(self) -> list[Path]:
        """Return what may go: artefacts that no result names or is made from, and work left behind.

        What the configuration asks for is in use, whether or not a result names it yet.
        """
        used: set[Path] = set()
        waiting = [*self.names(), *map(Path, self.plan.artefacts)]
        while waiting:
            path = waiting.pop()
            # A parent may have been removed by hand: what is made from it stays in use.
            if path not in used and (path / store.PROVENANCE).exists():
                used.add(path)
                waiting += [Path(p) for p in store.read_provenance(path)["parents"].values()]
        return [path for path in self.present() if path not in used] + self._work_left()

    def _work_left(self) -> list[Path]:
        """Return working directories of artefacts that are published, or that nothing asks for.

        What a process holds stays: another configuration may ask for it. So does a young draft: of data,
        replies and built-in sources no process holds anything.
        """
        return [
            work
            for artefact, work in self._work()
            if ((artefact / store.PROVENANCE).exists() or str(artefact) not in self.plan.artefacts)
            and not self._is_worked_on(work)
        ]

    def _is_worked_on(self, path: Path) -> bool:
        """Return whether a process works on what is to go at this moment, as far as can be told."""
        place = path.relative_to(self.root)
        if place.parts[0] == "work":
            return is_held(path)
        if not _is_draft(place):
            return False
        work = self.root / store.work_of(_artefact_of_draft(place))
        return is_held(work) or time.time() - newest(path) < YOUNG

    def _work(self) -> list[tuple[Path, Path]]:
        """Return (artefact, its working directory or draft)."""
        downloads = [(Path(*w.parts[1:]), w) for kind in ("models", "datasets")
                     for w in self.root.glob(f"work/{kind}/*/*")]  # fmt: skip
        states = [
            (Path("store", *w.parts[1:]), w) for stage in STAGES for w in self.root.glob(f"work/{stage}/*")
        ]
        drafts = [(_artefact_of_draft(p), p) for place in PLACES
                  for p in self.root.glob(place.removesuffix("*") + ".*.partial")]  # fmt: skip
        return sorted(downloads + states + drafts)

    def describe(self, path: Path) -> str:
        """Return a line of what may go: size, path, and how far unfinished work has come."""
        steps = [
            int(step.name.removeprefix("step-")) for step in path.glob("step-*") if step.name[5:].isdigit()
        ]
        state = f"  an unfinished training, saved at step {max(steps)}" if steps else ""
        return f"{human(size(path)):>9}  {path}{state}"

    def remove(self, paths: Iterable[Path]) -> list[Path]:
        """Remove directories; return those that a process has taken up by now, or removed: they are left."""
        left = []
        for path in paths:
            if not path.exists() or self._is_worked_on(path):
                left.append(path)
            else:
                shutil.rmtree(path)
        return left


def _is_draft(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def _artefact_of_draft(path: Path) -> Path:
    return path.parent / path.name[1:].removesuffix(".partial")


def _bare(scenario: str) -> str:
    return scenario.removeprefix("results/")


def _copy(source: Path, artefact: Artefact) -> None:
    """Publish `source` again under the name of `artefact`, on the same disk blocks where possible."""
    if wrong := store.check(source):
        raise UserError(f"{source} is damaged and cannot be adopted: {'; '.join(wrong)}")
    old = store.read_provenance(source)
    record = {
        **artefact.spec, **{k: old[k] for k in ("metrics", "versions") if k in old},
        "adopted_from": [*old.get("adopted_from", []), str(source)],
    }  # fmt: skip
    with store.publish(Path(artefact.path), record) as draft:
        draft.run |= json.loads((source / store.RUN).read_text())
        for name in old["files"]:
            store.link_or_copy(source / name, draft.path / name)


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return a tree's leaves by their dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return leaves


def differences(path: Path) -> list[str]:
    """Return what is wrong with an artefact, in words."""
    try:
        return store.check(path)
    except DataError as error:
        return [str(error)]


def size(path: Path) -> int:
    """Return the bytes of all files below a directory."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def newest(path: Path) -> float:
    """Return when something in a directory was last written, in seconds; 0 if it is gone."""
    times = []
    for each in [path, *path.rglob("*")]:
        with suppress(FileNotFoundError):  # whoever writes it may also rename it
            times.append(each.lstat().st_mtime)
    return max(times, default=0.0)


def age(seconds: float) -> str:
    """Return a time to read."""
    for unit, length in (("d", 86400), ("h", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 60:.0f} min"


def human(size_bytes: float) -> str:
    """Return a size to read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
