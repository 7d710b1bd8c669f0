"""Downloading files of a commit: by ranges, into a `.part` that outlives the process, checked.

The Hub's client starts a file anew when its process dies, and checks no hash (measured). Here what
has arrived stays, and a file gets its name only once its hash is the Hub's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from huggingface_hub import get_session
from huggingface_hub.utils import hf_raise_for_status

from rlhf import hub
from rlhf.errors import UserError
from rlhf.hub import RemoteFile, Snapshot
from rlhf.progress import progress
from rlhf.retry import Transient, retried

logger = logging.getLogger(__name__)

CHUNK = 32 << 20  # bytes asked for at once: what a death of the process can cost, at most
STREAMS = 4  # files at a time
TIMEOUT = 30.0  # seconds without a byte
CORRUPT = 3  # downloads of one file whose hash is wrong, before we give up

Moved = Callable[[int], None]  # told of every byte that arrives


def download(snapshot: Snapshot, names: Iterable[str], directory: Path) -> None:
    """Bring files of a commit into a directory; those that lie there are whole and stay.

    Raises:
        UserError: the Hub or the volume failed for good; what has arrived stays for the next time.
    """
    wanted = set(names)
    files = [f for f in snapshot.files if f.name in wanted and not (directory / f.name).exists()]
    if files:
        hub.refuse_if_offline(f"{files[0].name} of {snapshot.kind} {snapshot.repository}")
    parts = [part for f in files if (part := _part(directory / f.name)).exists()]
    present = sum(part.stat().st_size for part in parts)
    _refuse_if_full(directory, sum(f.size for f in files) - present)
    total, stopped = sum(f.size for f in files), threading.Event()
    with (
        progress(None, snapshot.repository, unit="B", total=total, start=present, scale=True) as bar,
        ThreadPoolExecutor(STREAMS) as pool,
    ):

        def moved(size: int) -> None:
            bar.update(size)
            if stopped.is_set():
                raise UserError("another file failed")

        jobs = [pool.submit(_file, snapshot, f, directory / f.name, moved, stopped) for f in files]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _refuse_if_full(directory: Path, needed: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"{directory}: {needed / 1e9:.1f} GB are to be downloaded, {free / 1e9:.1f} GB are free on the"
            " volume: enlarge it, or see `scripts/store.py gc`"
        )


def _file(snapshot: Snapshot, file: RemoteFile, target: Path, moved: Moved, stopped: threading.Event) -> None:
    """Download one file until its hash is right."""
    part = _part(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(CORRUPT):
        if _complete(snapshot, file, part, moved, stopped) == (file.sha256 or file.blob_id):
            os.rename(part, target)
            return
        logger.warning("%s: what arrived has another hash than the Hub says; starting it anew", file.name)
        moved(-file.size)
        part.unlink()
    raise UserError(
        f"{file.name} of {snapshot.repository}: {CORRUPT} downloads had another hash than the Hub says"
        f" ({file.sha256 or file.blob_id}): something between here and the Hub changes it; check HF_ENDPOINT"
        " and the proxy"
    )


def _complete(
    snapshot: Snapshot, file: RemoteFile, part: Path, moved: Moved, stopped: threading.Event
) -> str:
    """Append to a part until it has its size; return its hash, in the Hub's way."""
    if part.exists() and part.stat().st_size > file.size:
        logger.warning("%s: the part on disk is too long; starting it anew", file.name)
        part.unlink()
    digest = _digest(file)
    # Unbuffered: what the server sent is on the volume's side when the process dies.
    with part.open("a+b", buffering=0) as out:
        out.seek(0)
        while block := out.read(CHUNK):
            digest.update(block)

        def fetch() -> None:
            moved(0)  # after a pause too: no more is asked for once another file failed
            while (start := out.tell()) < file.size:
                for block in _range(snapshot, file, start):
                    out.write(block)
                    digest.update(block)
                    moved(len(block))

        retried(file.name, fetch, moved=out.tell, sleep=stopped.wait)
        os.fsync(out.fileno())
    return digest.hexdigest()


def _digest(file: RemoteFile) -> Any:
    """Return the hash that the Hub knows of a file: sha256, or git's of a blob."""
    if file.sha256:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _range(snapshot: Snapshot, file: RemoteFile, start: int) -> Iterator[bytes]:
    """Yield the bytes of a file from `start`, CHUNK at most."""
    end = min(start + CHUNK, file.size)
    headers = {**hub.headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with (
        hub.explained(snapshot.kind, snapshot.repository, snapshot.revision, snapshot.commit, file.name),
        get_session().stream(
            "GET", snapshot.url(file.name), headers=headers, timeout=TIMEOUT, follow_redirects=True
        ) as response,
    ):
        hf_raise_for_status(response)
        _check(response, snapshot, file, start)
        left = end - start
        for block in response.iter_bytes(1 << 20):
            yield block[:left]
            left -= len(block[:left])
            if not left:
                return
        raise Transient(f"the connection ended {left} bytes early")


def _check(response: Any, snapshot: Snapshot, file: RemoteFile, start: int) -> None:
    """Refuse an answer that is not the range, file or commit that was asked for."""
    for answer in [*response.history, response]:
        commit = answer.headers.get("x-repo-commit", snapshot.commit)
        if commit != snapshot.commit:
            raise UserError(
                f"{file.name} of {snapshot.repository} came from commit {commit}, {snapshot.commit} was asked"
                " for: the mirror is not up to date, or not the same repository; check HF_ENDPOINT"
            )
    asked = response.headers.get("content-range", "")
    if response.status_code == 206 and asked.startswith(f"bytes {start}-"):
        size = asked.rpartition("/")[2]
    elif response.status_code == 200 and start == 0:
        size = response.headers.get("content-length", str(file.size))
    else:
        raise Transient(f"the server answers {response.status_code} {asked or 'without a range'} to a range")
    if size not in (str(file.size), "*"):
        raise Transient(f"the server says it has {size} bytes, the Hub's list says {file.size}")
