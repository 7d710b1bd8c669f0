"""Sources on the volume and on a Hub, through the entry scripts' own choices."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import fetch_dataset
import fetch_model
import hub_content
import pytest

from rlhf.errors import UserError
from rlhf.sources import fetching
from rlhf.sources.fetching import Source
from rlhf.store import naming

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
CHOICES = {"model": fetch_model.choose, "dataset": fetch_dataset.choose}


def fetch(stage, source, tmp_path):
    """Fetch a file or directory of the volume."""
    config = {stage: str(source), "fingerprint": naming.fingerprint(Path(source))}
    work = Path(tempfile.mkdtemp(dir=tmp_path))  # held until this process ends
    return fetching.fetch(Source.of(stage, config, tmp_path / "out", work), CHOICES[stage])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "vocab.json"])
def test_a_pointer_of_git_lfs_is_no_model(tmp_path, name):
    hub_content.opt(tmp_path / "opt")
    (tmp_path / "opt/tf_model.h5").write_text(LFS)  # nobody needs it
    fetch("model", tmp_path / "opt", tmp_path)
    (tmp_path / "opt" / name).write_text(LFS)
    with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS.*run `git lfs pull` in .*opt"):
        fetch("model", tmp_path / "opt", tmp_path)


@pytest.mark.parametrize("lacking", [["config.json"], ["merges.txt"], ["vocab.json"], ["pytorch_model.bin"]])
def test_a_directory_that_lacks_something_is_no_model(tmp_path, lacking):
    hub_content.opt(tmp_path / "opt")
    for name in lacking:
        (tmp_path / "opt" / name).unlink()
    with pytest.raises(UserError, match=r"opt: not a usable model: it needs config.json"):
        fetch("model", tmp_path / "opt", tmp_path)


def test_a_clones_hidden_directories_are_no_rows(tmp_path):
    hub_content.rm_static(tmp_path / "rows", rows=20)
    for hidden in (".git/objects/12.json", ".cache/huggingface/x.parquet", "data/.old.parquet"):
        (tmp_path / "rows" / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / hidden).write_text("{}")
    found = fetch("dataset", tmp_path / "rows", tmp_path)
    assert [n.split("/")[1].split("-")[0] for n in found.names] == ["test", "train"]


def test_rows_that_are_a_pointer_of_git_lfs_are_refused_and_a_single_file_is_rows_too(tmp_path):
    (tmp_path / "rows.parquet").write_text(LFS)
    with pytest.raises(UserError, match="run `git lfs pull`"):
        fetch("dataset", tmp_path / "rows.parquet", tmp_path)
    shutil.copy(Path(__file__).parents[2] / "data/rm-static.json", tmp_path / "rows.json")
    assert fetch("dataset", tmp_path / "rows.json", tmp_path).names == ["rows.json"]


def test_a_file_that_changes_while_it_is_copied_is_refused(tmp_path):
    shutil.copy(Path(__file__).parents[2] / "data/rm-static.json", tmp_path / "rows.json")
    fetched = fetch("dataset", tmp_path / "rows.json", tmp_path)
    fetched.refuse_change()
    with (tmp_path / "rows.json").open("a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"rows\.json has changed since the run was planned: start it again"):
        fetched.refuse_change()


def test_files_without_rows_are_reported_and_only_on_the_hub_with_its_copies(tmp_path):
    (tmp_path / "x.txt").write_text("hi")
    no_rows = r"no rows in Parquet, JSON, JSON lines, CSV or Arrow \(found {}\)"
    said = no_rows.format(r"x\.txt") + ": convert them to one of these"
    with pytest.raises(UserError, match=rf"x\.txt: {said}$"):
        fetch("dataset", tmp_path / "x.txt", tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=no_rows.format("no file")):
        fetch("dataset", tmp_path / "none", tmp_path)
    with pytest.raises(
        UserError, match=no_rows.format("make.py") + r": .* set revision: refs/convert/parquet$"
    ):
        fetch_dataset.choose(["make.py"], fetch_dataset.HUB_REMEDY)
