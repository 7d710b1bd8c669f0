"""Downloading files of a commit: in ranges, to `.part` files that survive a crash, with hashes checked.

When its process dies, the Hub's client starts a file again, and it checks no hash (measured). Here a
`.part` is continued, and a file gets its name only if its hash is the Hub's.
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

from rlhf.errors import UserError
from rlhf.files import atomic_rename
from rlhf.progress import progress
from rlhf.sources import hub
from rlhf.sources.hub import RemoteFile, Snapshot
from rlhf.sources.retry import Transient, retried

logger = logging.getLogger(__name__)

CHUNK = 32 << 20  # bytes of a request: the most that a crash can lose per file
STREAMS = 4  # files at a time
TIMEOUT = 30.0  # seconds without a byte
CORRUPT = 3  # downloads of a file with a wrong hash before we give up

Advance = Callable[[int], None]  # called with the number of bytes that arrived


def download(snapshot: Snapshot, names: Iterable[str], directory: Path) -> None:
    """Download files of a commit to a directory; files that exist there are complete and stay.

    Raises:
        UserError: the Hub or the volume failed repeatedly; the next call continues what has arrived.
    """
    missing = {name for name in names if not (directory / name).exists()}
    files = [f for f in snapshot.files if f.name in missing]
    if files:
        hub.refuse_if_offline(f"{files[0].name} of {snapshot.repo_type} {snapshot.repository}")
    partial = [part for f in files if (part := _part(directory / f.name)).exists()]
    present = sum(part.stat().st_size for part in partial)
    _refuse_if_full(directory, sum(f.size for f in files) - present)
    total, stopped = sum(f.size for f in files), threading.Event()
    with (
        progress(None, snapshot.repository, unit="B", total=total, start=present, scale=True) as bar,
        ThreadPoolExecutor(STREAMS) as pool,
    ):

        def advance(size: int) -> None:
            bar.update(size)
            if stopped.is_set():
                raise UserError("another file failed")

        jobs = [pool.submit(_download, snapshot, f, directory / f.name, advance, stopped) for f in files]
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
            " volume: enlarge it, or free space with `scripts/store.py gc`"
        )


def _download(
    snapshot: Snapshot, file: RemoteFile, target: Path, advance: Advance, stopped: threading.Event
) -> None:
    """Download one file until its hash is right."""
    part = _part(target)
    part.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(CORRUPT):
        if _complete(snapshot, file, part, advance, stopped) == (file.sha256 or file.blob_id):
            atomic_rename(part, target)
            return
        logger.warning(
            "%s: the downloaded file has another hash than the Hub says; starting again", file.name
        )
        advance(-file.size)
        part.unlink()
    raise UserError(
        f"{file.name} of {snapshot.repository}: {CORRUPT} downloads had another hash than the Hub says"
        f" ({file.sha256 or file.blob_id}): something between here and the Hub changes it; check HF_ENDPOINT"
        " and the proxy"
    )


def _complete(
    snapshot: Snapshot, file: RemoteFile, part: Path, advance: Advance, stopped: threading.Event
) -> str:
    """Append to a `.part` until it has the file's size; return its hash, of the type that the Hub has."""
    if part.exists() and part.stat().st_size > file.size:
        logger.warning("%s: the part on disk is too long; starting again", file.name)
        part.unlink()
    digest = _digest(file)
    # Unbuffered: a crash of this process must not lose bytes that have arrived.
    with part.open("a+b", buffering=0) as out:
        out.seek(0)
        while block := out.read(CHUNK):
            digest.update(block)

        def fetch() -> None:
            advance(0)  # raises after a pause if another file has failed
            while (start := out.tell()) < file.size:
                for block in _range(snapshot, file, start):
                    out.write(block)
                    digest.update(block)
                    advance(len(block))

        retried(file.name, fetch, position=out.tell, sleep=stopped.wait)
        os.fsync(out.fileno())
    return digest.hexdigest()


def _digest(file: RemoteFile) -> Any:
    """Return a hash object of the type that the Hub has for a file: sha256, or git's hash of a blob."""
    if file.sha256:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _range(snapshot: Snapshot, file: RemoteFile, start: int) -> Iterator[bytes]:
    """Yield the bytes of a file from `start` on, CHUNK at most."""
    end = min(start + CHUNK, file.size)
    headers = {**hub.headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    with (
        hub.explained(snapshot.repo_type, snapshot.repository, snapshot.revision, snapshot.commit, file.name),
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
    """Refuse a response with another range, file or commit than the requested one.

    Raises:
        UserError: it is of another commit.
        Transient: it is another range, or the file has another size.
    """
    for hop in [*response.history, response]:  # redirects first
        commit = hop.headers.get("x-repo-commit", snapshot.commit)
        if commit != snapshot.commit:
            raise UserError(
                f"{file.name} of {snapshot.repository} came from commit {commit}, not from {snapshot.commit}:"
                " the mirror is outdated, or has another repository; check HF_ENDPOINT"
            )
    content_range = response.headers.get("content-range", "")
    if response.status_code == 206 and content_range.startswith(f"bytes {start}-"):
        size = content_range.rpartition("/")[2]
    elif response.status_code == 200 and start == 0:
        size = response.headers.get("content-length", str(file.size))
    else:
        status = f"{response.status_code} {content_range or 'without a range'}"
        raise Transient(f"the server responded {status} to the request of a range")
    if size not in (str(file.size), "*"):
        raise Transient(f"the server says that the file has {size} bytes, the Hub's list says {file.size}")
