"""Downloads against a server that speaks the Hub's protocol, through the real client."""

from __future__ import annotations

import random

import pytest
from hub_server import HubServer
from huggingface_hub import constants

from rlhf import download as downloading
from rlhf import hub, retry
from rlhf.errors import UserError

NAMES = ["rows.data", "README.md", "deep/empty.json"]


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "hub/datasets/a/b"
    (folder / "deep").mkdir(parents=True)
    (folder / "rows.data").write_bytes(random.Random(1).randbytes(1_000_000))
    (folder / "README.md").write_text("a card")
    (folder / "deep/empty.json").write_text("")
    monkeypatch.setattr(downloading, "CHUNK", 1 << 18)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("HF_TOKEN", "")
    before = constants.ENDPOINT
    with HubServer(tmp_path / "hub") as hub_server:
        monkeypatch.setattr(constants, "ENDPOINT", hub_server.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(before, hub_server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub_server


def snapshot(revision="main", recorded=None):
    return hub.snapshot("dataset", "a/b", revision, recorded)


def fetch(tmp_path, found=None):
    downloading.download(found or snapshot(), NAMES, tmp_path / "here")
    return tmp_path / "here"


def is_right(server, here):
    theirs = server.root / "datasets/a/b"
    files = sorted(p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file())
    return files == sorted(NAMES) and all((here / n).read_bytes() == (theirs / n).read_bytes() for n in NAMES)


def test_what_arrives_is_what_lies_there(server, tmp_path):
    assert is_right(server, fetch(tmp_path))
    assert server.sent != []


@pytest.mark.parametrize("seed", range(20))
def test_faults_end_in_the_right_bytes(server, tmp_path, seed):
    kinds = [
        "500",
        "502",
        "503",
        "504",
        "429",
        "408",
        "cut",
        "corrupt",
        "slow",
        "size",
        "redirect",
        "no range",
    ]
    # Four different ones: three "corrupt" may all meet one file, which is then refused, and rightly.
    server.faults.extend(random.Random(seed).sample(kinds, 4))
    assert is_right(server, fetch(tmp_path))


@pytest.mark.parametrize("fault", ["500", "429", "size", "no range"])
def test_a_fault_that_stays_is_told_and_what_arrived_stays(server, tmp_path, fault):
    found = snapshot()
    # Three: whichever file is first, the last of the four ranges of rows.data meets the fault.
    server.faults.extend([""] * 3 + [fault] * 100)
    with pytest.raises(UserError, match=r"attempts|another hash"):
        fetch(tmp_path, found)
    assert not (tmp_path / "here/rows.data").exists()
    server.faults.clear()
    assert is_right(server, fetch(tmp_path, found))


def test_content_that_stays_corrupt_is_told(server, tmp_path):
    server.faults.extend(["corrupt"] * 100)
    with pytest.raises(UserError, match="another hash than the Hub says"):
        fetch(tmp_path)
    assert not (tmp_path / "here/rows.data").exists()


def test_a_file_of_another_commit_is_refused(server, tmp_path):
    server.faults.extend(["commit"] * 10)
    with pytest.raises(UserError, match="came from commit 0000"):
        fetch(tmp_path)


def test_a_part_on_disk_is_gone_on_with(server, tmp_path):
    content = (server.root / "datasets/a/b/rows.data").read_bytes()
    (tmp_path / "here").mkdir()
    (tmp_path / "here/rows.data.part").write_bytes(content[:700_000])
    assert is_right(server, fetch(tmp_path))
    assert sum(n for name, _, n in server.sent if name == "rows.data") == 300_000


@pytest.mark.parametrize("damage", [b"x" * 700_000, b"x" * 1_200_000])
def test_a_damaged_part_is_downloaded_anew(server, tmp_path, damage):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/rows.data.part").write_bytes(damage)
    assert is_right(server, fetch(tmp_path))


def test_whole_files_are_not_asked_for_again(server, tmp_path):
    found = snapshot()
    fetch(tmp_path, found)
    server.sent.clear()
    fetch(tmp_path, found)
    assert server.sent == []


def test_a_recorded_commit_is_downloaded_though_main_has_moved(server, tmp_path):
    first = snapshot()
    old = (server.root / "datasets/a/b/rows.data").read_bytes()
    (server.root / "datasets/a/b/rows.data").write_bytes(b"other")
    assert snapshot().commit != first.commit
    again = snapshot(recorded=first.commit)
    assert again == first
    assert (fetch(tmp_path, again) / "rows.data").read_bytes() == old


def test_too_little_room_is_told_before_a_byte_is_asked_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"0.0 GB are to be downloaded, 0.0 GB are free"):
        fetch(tmp_path)
    assert server.sent == []


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        (lambda s, m: s.secrets.update({"a/b": "t"}), "there is no dataset a/b at .*HF_TOKEN is not set"),
        (lambda s, m: (s.secrets.update({"a/b": "t"}), s.gated.add("a/b")), "is gated: accept its terms"),
        (lambda s, m: s.metadata_faults.extend(["403"] * 9), r"refused dataset a/b \(403\)"),
        (lambda s, m: s.metadata_faults.extend(["503"] * 9), r"answered 503 for dataset a/b \(6 attempts\)"),
        (lambda s, m: s.metadata_faults.extend(["429"] * 9), r"answered 429"),
        (lambda s, m: s.metadata_faults.extend(["418"]), r"answered 418"),
        (lambda s, m: s.metadata_faults.append("html"), "does not speak the Hub's protocol"),
        (lambda s, m: m.setattr(constants, "HF_HUB_OFFLINE", True), "nothing may be downloaded"),
    ],
)
def test_what_cannot_be_had_is_told_with_what_to_do(server, monkeypatch, setup, said):
    setup(server, monkeypatch)
    with pytest.raises(UserError, match=said):
        snapshot()


def test_a_missing_revision_and_a_missing_repository_are_told(server):
    with pytest.raises(UserError, match="dataset a/b has no revision v9: choose a branch"):
        snapshot("v9")
    with pytest.raises(UserError, match="there is no dataset a/c at"):
        hub.snapshot("dataset", "a/c", "main", None)


def test_another_commit_than_asked_for_is_refused(server):
    commit = snapshot().commit
    server.metadata_faults.append("commit")
    with pytest.raises(UserError, match=f"gives commit 0+ for a/b, {commit} was asked for"):
        snapshot(commit)


def test_a_busy_hub_is_asked_again_and_a_token_opens_the_door(server, monkeypatch):
    server.metadata_faults.extend(["503", "500", "429"])
    server.secrets["a/b"] = "hf_secret"
    server.gated.add("a/b")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert snapshot().files


def test_a_hub_that_cannot_be_reached_is_told(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1:9"):
        snapshot()


def test_a_file_that_vanished_is_told(server, tmp_path):
    found = snapshot()
    del server.commits["datasets", "a/b", found.commit]["README.md"]
    (server.root / "datasets/a/b/README.md").unlink()
    with pytest.raises(UserError, match="lacks a file that it lists"):
        fetch(tmp_path, found)
