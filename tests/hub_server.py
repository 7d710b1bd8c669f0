"""A server that speaks the Hugging Face Hub's protocol, as far as the real client asks, with faults.

It serves `{root}/models/{org}/{name}/...` and `{root}/datasets/{org}/{name}/...`. A commit is a hash
of a repository's content, `main` is the present one, and older ones stay served.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from ssl import SSLContext
from typing import Self
from urllib.parse import unquote, urlsplit

BLOCK = 1 << 16
LFS = (".bin", ".safetensors", ".parquet", ".arrow", ".data")
API = re.compile(r"/api/(?P<sources>models|datasets)/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>.+))?")
FILE = re.compile(r"(/cdn)?/(?P<set>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Local:
    """A server on a free port of this machine while its block lasts; `handler` classes get it as `owner`."""

    def __init__(self, handler: type[BaseHTTPRequestHandler], tls: SSLContext | None = None) -> None:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"owner": self}))
        self._http.daemon_threads = True
        if tls:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self.port = self._http.server_port
        self.endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()


class HubServer(Local):
    """The server; use it as a context manager. With `tls` it speaks HTTPS.

    `faults` are used up one per request of a file. `sent` are (file, start, bytes) of every response.
    `secrets` are repository -> token that may read it; `gated` those whose terms must be accepted.
    """

    def __init__(self, root: Path, tls: SSLContext | None = None) -> None:
        self.root = root
        self.faults: deque[str] = deque()
        self.metadata_faults: deque[str] = deque()
        self.sent: list[tuple[str, int, int]] = []
        self.requests: list[str] = []
        self.hosts: set[str] = set()
        self.secrets: dict[str, str] = {}
        self.gated: set[str] = set()
        self.open_lists = False  # whether anyone may see a list of files
        self.listed: dict[str, object] = {}  # laid over the last file of a list
        self.pause = 0.0  # seconds per block
        self.commits: dict[tuple[str, str, str], dict[str, bytes]] = {}
        super().__init__(_Handler, tls)

    def files(self, sources: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return (commit, file -> content) of a revision."""
        folder = self.root / sources / name
        if revision == "refs/convert/parquet":  # a branch of its own, which is beside the repository
            found = self.files(sources, f"{name}.convert", "main")
            if found is not None:
                self.commits[sources, name, found[0]] = found[1]
            return found
        if (kept := self.commits.get((sources, name, revision))) is not None:
            return revision, kept
        if not folder.is_dir():
            return None
        now = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        listing = sorted((n, git_hash(c)) for n, c in now.items())
        commit = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self.commits[sources, name, commit] = now
        return (commit, now) if revision in ("main", commit) else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)  # as a proxy requests have whole addresses
        self.owner.hosts.add(self.headers.get("Host", ""))
        self.owner.requests.append(f"{self.command} {path}")
        try:
            if found := API.fullmatch(path):
                self._api(found["sources"], found["id"], found["revision"] or "main")
            elif found := FILE.fullmatch(path):
                sources = "datasets" if found["set"] else "models"
                self._file(sources, found["id"], found["revision"], found["file"], cdn=bool(found[1]))
            else:
                self._error(404, "EntryNotFound")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _error(self, status: int, code: str = "", **headers: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _busy(self, fault: str) -> None:
        """Answer `STATUS`, `STATUS after SECONDS`, or `STATUS limit SECONDS` as the Hub's limits of rate do."""
        status, how, seconds = f"{fault} after 0".split()[:3]
        header = {"limit": {"RateLimit": f'"api";r=0;t={seconds}'}, "after": {"Retry_After": seconds}}[how]
        self._error(int(status), **header)

    def _refused(self, name: str) -> bool:
        wanted = self.owner.secrets.get(name)
        if wanted is None or self.headers.get("Authorization") == f"Bearer {wanted}":
            return False
        known = "Authorization" in self.headers
        if name in self.owner.gated:
            self._error(403 if known else 401, "GatedRepo")
        else:
            self._error(401, "RepoNotFound")
        return True

    def _api(self, sources: str, name: str, revision: str) -> None:
        fault = self.owner.metadata_faults.popleft() if self.owner.metadata_faults else ""
        if fault[:3].isdigit():
            return self._busy(fault)
        if not self.owner.open_lists and self._refused(name):
            return None
        if not (self.owner.root / sources / name).is_dir():
            return self._error(401, "RepoNotFound")
        if (found := self.owner.files(sources, name, revision)) is None:
            return self._error(404, "RevisionNotFound")
        commit, files = found
        if fault == "html":
            body = b"<html>sign in</html>"
        else:
            listing = {"id": name, "sha": "0" * 40 if fault == "commit" else commit, "private": False}
            listing["siblings"] = [self._sibling(n, c) for n, c in sorted(files.items())]
            listing["siblings"][-1].update(self.owner.listed)
            body = json.dumps(listing).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    @staticmethod
    def _sibling(name: str, content: bytes) -> dict:
        sibling = {"rfilename": name, "size": len(content), "blobId": git_hash(content)}
        if name.endswith(LFS):
            digest = hashlib.sha256(content).hexdigest()
            sibling["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
        return sibling

    def _file(self, sources: str, name: str, revision: str, file: str, *, cdn: bool) -> None:
        if self._refused(name) and not cdn:
            return None
        found = self.owner.files(sources, name, revision)
        if found is None or file not in found[1]:
            return self._error(404, "EntryNotFound")
        fault = self.owner.faults.popleft() if self.owner.faults and not cdn else ""
        if fault[:3].isdigit():
            return self._busy(fault)
        if fault == "redirect":
            return self._error(302, Location="/cdn" + self.path, X_Repo_Commit=revision)
        return self._content(file, found[1][file], fault, "0" * 40 if fault == "commit" else revision)

    def _content(self, file: str, content: bytes, fault: str, commit: str) -> None:
        size, start, end = len(content), 0, len(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and fault != "no range":
            start, end = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
        self.send_response(206 if wanted and fault != "no range" else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size + (fault == 'size')}")
        self.end_headers()
        if fault == "stall":
            time.sleep(1)
        body = content[start:end]
        if fault == "corrupt" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        if self.command == "GET":
            self._send(file, start, body, 0.02 if fault == "slow" else self.owner.pause)

    def _send(self, file: str, start: int, body: bytes, pause: float) -> None:
        self.owner.sent.append((file, start, 0))
        place, done = len(self.owner.sent) - 1, 0
        for begin in range(0, len(body), BLOCK):
            done += self.wfile.write(body[begin : begin + BLOCK])
            self.owner.sent[place] = (file, start, done)
            if pause:
                time.sleep(pause)
