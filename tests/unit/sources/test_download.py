"""Downloads against a server that speaks the Hub's protocol, through the real client."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants

from rlhf.errors import UserError
from rlhf.sources import download, hub, lock, retry

SCRIPTS = str(Path(__file__).parents[3] / "scripts")
NAMES = ["rows.data", "README.md", "deep/empty.json"]


@pytest.fixture
def server(tmp_path, monkeypatch):
    folder = tmp_path / "hub/datasets/a/b"
    (folder / "deep").mkdir(parents=True)
    (folder / "rows.data").write_bytes(random.Random(1).randbytes(1_000_000))
    (folder / "README.md").write_text("a card")
    (folder / "deep/empty.json").write_text("")
    monkeypatch.setattr(download, "CHUNK", 1 << 18)
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
    download.download(found or snapshot(), NAMES, tmp_path / "here")
    return tmp_path / "here"


def is_right(server, here):
    theirs = server.root / "datasets/a/b"
    files = sorted(p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file())
    return files == sorted(NAMES) and all((here / n).read_bytes() == (theirs / n).read_bytes() for n in NAMES)


def test_what_arrives_is_what_the_server_has(server, tmp_path):
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
    assert not server.faults  # all were met


@pytest.mark.parametrize("fault", ["500", "429", "size", "no range"])
def test_a_fault_that_stays_is_reported_and_what_arrived_stays(server, tmp_path, fault):
    found = snapshot()
    # Three: whichever file is first, the last of the four ranges of rows.data meets the fault.
    server.faults.extend([""] * 3 + [fault] * 100)
    with pytest.raises(UserError, match=r"attempts|another hash"):
        fetch(tmp_path, found)
    assert not (tmp_path / "here/rows.data").exists()
    server.faults.clear()
    assert is_right(server, fetch(tmp_path, found))


def test_content_that_stays_corrupt_is_reported(server, tmp_path):
    server.faults.extend(["corrupt"] * 100)
    with pytest.raises(UserError, match="another hash than the Hub says"):
        fetch(tmp_path)
    assert not (tmp_path / "here/rows.data").exists()


def test_a_file_of_another_commit_is_refused(server, tmp_path):
    server.faults.extend(["commit"] * 10)
    with pytest.raises(UserError, match="came from commit 0000"):
        fetch(tmp_path)


def test_a_partial_file_on_disk_is_completed(server, tmp_path):
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


def test_complete_files_are_not_requested_again(server, tmp_path):
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


def test_too_little_room_is_reported_before_a_byte_is_requested(server, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"0.0 GB are to be downloaded, 0.0 GB are free"):
        fetch(tmp_path)
    assert server.sent == []


@pytest.mark.parametrize(
    ("setup", "said"),
    [
        (lambda s, m: s.secrets.update({"a/b": "t"}), "there is no dataset a/b at .*HF_TOKEN is not set"),
        (
            lambda s, m: (s.secrets.update({"a/b": "t"}), s.gated.add("a/b")),
            r"is gated: accept its terms at http://.*/datasets/a/b",
        ),
        (lambda s, m: s.metadata_faults.extend(["403"] * 9), r"refused dataset a/b \(403\)"),
        (lambda s, m: s.metadata_faults.extend(["503"] * 9), r"responded 503 for dataset a/b \(6 attempts\)"),
        (lambda s, m: s.metadata_faults.extend(["429"] * 9), r"responded 429"),
        (lambda s, m: s.metadata_faults.append("418"), r"responded 418"),
        (
            lambda s, m: s.metadata_faults.append("407"),
            r"the proxy requires a name and password .*HTTPS_PROXY",
        ),
        (lambda s, m: s.metadata_faults.append("html"), "does not speak the Hub's protocol"),
        (lambda s, m: m.setattr(constants, "HF_HUB_OFFLINE", True), "nothing may be downloaded"),
        (
            lambda s, m: s.listed.update(rfilename="../../evil"),
            r"'../../evil' for dataset a/b, which would be",
        ),
        (lambda s, m: s.listed.update(rfilename="a/../../evil"), "outside of its directory"),
        (lambda s, m: s.listed.update(rfilename="/tmp/evil"), "outside of its directory"),
        (lambda s, m: s.listed.update(size=None, lfs=None), "without size or hash"),
        (lambda s, m: s.listed.update(blobId=None, lfs=None), "without size or hash"),
        (lambda s, m: m.setenv("HF_TOKEN", "hf_\u00e4"), "HF_TOKEN contains a character"),
        (
            lambda s, m: m.setattr(constants, "ENDPOINT", "http://a b:port"),
            "cannot request .*HF_ENDPOINT, HTTPS_PROXY",
        ),
    ],
)
def test_what_cannot_be_downloaded_is_reported_with_what_to_do(server, monkeypatch, setup, said):
    setup(server, monkeypatch)
    with pytest.raises(UserError, match=said):
        snapshot()


def test_a_missing_revision_and_a_missing_repository_are_reported(server):
    with pytest.raises(UserError, match="dataset a/b has no revision v9: choose a branch"):
        snapshot("v9")
    with pytest.raises(UserError, match="there is no dataset a/c at"):
        hub.snapshot("dataset", "a/c", "main", None)


def test_another_commit_than_the_requested_one_is_refused(server):
    commit = snapshot().commit
    server.metadata_faults.append("commit")
    with pytest.raises(UserError, match=f"gives commit 0+ for a/b, {commit} was requested"):
        snapshot(commit)


def test_a_busy_hub_is_tried_again_and_a_token_gives_access(server, monkeypatch):
    server.metadata_faults.extend(["503", "500", "429"])
    server.secrets["a/b"] = "hf_secret"
    server.gated.add("a/b")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert snapshot().files


def test_a_hub_that_cannot_be_reached_is_reported(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1:9"):
        snapshot()


def test_a_file_that_vanished_is_reported(server, tmp_path):
    found = snapshot()
    del server.commits["datasets", "a/b", found.commit]["README.md"]
    (server.root / "datasets/a/b/README.md").unlink()
    with pytest.raises(UserError, match=r"lacks a file that it lists, README.md: choose") as caught:
        fetch(tmp_path, found)
    assert "\n" not in str(caught.value)


def test_a_recorded_commit_that_is_gone_is_reported_with_the_lock_and_the_users_revision(server, tmp_path):
    said = "no longer has commit 1111.* which rlhf.lock records for revision main: .*remove its line"
    with pytest.raises(UserError, match=said):
        snapshot(recorded="1" * 40)


def test_offline_an_interrupted_download_is_refused_and_a_whole_one_is_not(server, tmp_path, monkeypatch):
    found = snapshot()
    server.faults.extend(["403"] * 9)
    with pytest.raises(UserError, match=r"refused .* of dataset a/b \(403\)"):
        fetch(tmp_path, found)
    server.faults.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"of dataset a/b is not on the volume, and nothing may be downloaded"
    ):
        fetch(tmp_path, found)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetch(tmp_path, found)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_right(server, fetch(tmp_path, found))


def test_a_file_that_may_not_be_read_is_reported(server, tmp_path):
    found = snapshot()
    server.secrets["a/b"] = "t"
    with pytest.raises(UserError, match=r"of dataset a/b at .*, or it is private"):
        fetch(tmp_path, found)
    server.gated.add("a/b")
    with pytest.raises(UserError, match=r"of dataset a/b is gated: accept its terms"):
        fetch(tmp_path, found)


@pytest.mark.parametrize("at", ["faults", "metadata_faults"])
def test_the_wait_that_a_busy_hub_requests_is_kept(server, tmp_path, monkeypatch, at):
    waited = []
    monkeypatch.setattr(retry.time, "sleep", waited.append)
    monkeypatch.setattr(
        download, "retried", lambda *a, **k: retry.retried(*a, **k | {"sleep": waited.append})
    )
    getattr(server, at).extend(["429 after 3", "429 limit 55"])
    fetch(tmp_path)
    assert sorted(waited) == [3.0, 56.0]  # in any order: several files are requested at a time


def test_an_interrupt_does_not_wait_as_long_as_a_busy_hub_requests(server, tmp_path, monkeypatch):
    def interrupted(_):
        while server.faults:
            time.sleep(0.01)
        time.sleep(0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "as_completed", interrupted)
    server.faults.append("429 after 20")
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path)
    assert time.monotonic() - before < 10


def test_a_server_that_stalls_is_tried_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.faults.append("stall")
    assert is_right(server, fetch(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_a_damaged_lock_is_reported(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rlhf.lock").write_text(content)
    with pytest.raises(UserError, match=r"rlhf.lock is damaged .*: repair it, or remove it"):
        lock.commit_of(tmp_path / "models/a/b@main")


def test_a_proxy_with_an_unknown_scheme_is_reported(server):
    code = "from rlhf.sources import hub; hub.snapshot('dataset', 'a/b', 'main', None)"
    env = {"HF_ENDPOINT": server.endpoint, "HTTP_PROXY": "foo://proxy:3128", "PYTHONPATH": SCRIPTS}
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert "UserError: cannot request" in run.stderr
    assert "HTTP_PROXY" in run.stderr


def test_what_is_gated_at_its_files_only_is_reported(server, tmp_path, monkeypatch):
    server.open_lists = True
    server.secrets["a/b"] = "hf_secret"
    server.gated.add("a/b")
    found = snapshot()
    with pytest.raises(
        UserError, match=r"of dataset a/b is gated: accept its terms at .*HF_TOKEN is not set"
    ):
        fetch(tmp_path, found)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert is_right(server, fetch(tmp_path, found))


def test_the_hubs_copy_in_parquet_is_a_revision(server, tmp_path):
    folder = server.root / "datasets/a/b.convert/default/train"
    folder.mkdir(parents=True)
    (folder / "0000.parquet").write_bytes(b"rows")
    found = snapshot("refs/convert/parquet")
    download.download(found, ["default/train/0000.parquet"], tmp_path)
    assert (tmp_path / "default/train/0000.parquet").read_bytes() == b"rows"


def test_lists_and_files_come_through_a_proxy(server, tmp_path):
    """The server is the proxy as well: the name of the Hub exists for nobody else."""
    code = (
        "import sys; from pathlib import Path; from rlhf.sources import hub, download; found = hub.snapshot("
    )
    code += "'dataset', 'a/b', 'main', None); download.download(found, ['rows.data'], Path(sys.argv[1]))"
    env = {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": server.endpoint, "PYTHONPATH": SCRIPTS}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ | env, check=True)
    assert (tmp_path / "rows.data").read_bytes() == (server.root / "datasets/a/b/rows.data").read_bytes()
    assert server.hosts == {"hub.invalid"}
