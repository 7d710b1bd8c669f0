"""The Hugging Face Hub: the commit of a revision, its files, and errors as sentences.

The `huggingface_hub` client makes the requests, so `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE` and the
proxy variables work as usual.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers

from rlhf.errors import UserError
from rlhf.sources.retry import Transient, retried

COMMIT = re.compile(r"[0-9a-f]{40}")
BUSY = {408, 425, 429, 500, 502, 503, 504}  # status codes after which another attempt may succeed

# The client's HTTP library: httpx, or httpx2 since version 2 of huggingface_hub.
http: Any = sys.modules[HfHubHTTPError.__bases__[0].__module__.split(".")[0]]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit: its size in bytes, and a hash.

    Large files have a `sha256` of their content, the others only git's `blob_id`.
    """

    name: str
    size: int
    blob_id: str
    sha256: str | None


@dataclass(frozen=True)
class Snapshot:
    """A commit of a repository."""

    repo_type: str  # model or dataset
    repository: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]

    def url(self, name: str) -> str:
        """Return the address of a file of the commit."""
        return hf_hub_url(
            self.repository, name, repo_type=self.repo_type, revision=self.commit, endpoint=constants.ENDPOINT
        )

    def as_json(self) -> dict[str, Any]:
        """Return the snapshot as JSON values, with `repo_type` under the name `kind`."""
        values = asdict(self)
        return {"kind": values.pop("repo_type"), **values}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Snapshot:
        """Return the snapshot with the JSON values of `as_json`."""
        files = tuple(RemoteFile(**file) for file in value["files"])
        return Snapshot(value["kind"], value["repository"], value["revision"], value["commit"], files)


def snapshot(repo_type: str, repository: str, revision: str, recorded: str | None) -> Snapshot:
    """Return the commit of a revision, with its files.

    Args:
        repo_type: model or dataset.
        recorded: the commit that this revision meant before, which is requested instead.

    Raises:
        UserError: it does not exist, may not be read, or the Hub cannot be reached.
    """
    name = f"{repo_type} {repository}"
    refuse_if_offline(name)

    def request() -> Any:
        with explained(repo_type, repository, revision, recorded):
            return HfApi(endpoint=constants.ENDPOINT).repo_info(
                repository, repo_type=repo_type, revision=recorded or revision, files_metadata=True
            )

    info = retried(name, request)
    expected = recorded or (revision if COMMIT.fullmatch(revision) else None)
    if expected and info.sha != expected:
        raise UserError(
            f"{constants.ENDPOINT} gives commit {info.sha} for {repository}, {expected} was requested"
            f"{' (rlhf.lock records it)' if recorded else ''}: it may be another repository; check HF_ENDPOINT"
            f" and the revision ({revision})"
        )
    files = tuple(_remote_file(f, name) for f in info.siblings)
    return Snapshot(repo_type, repository, revision, info.sha, files)


def _remote_file(listed: Any, what: str) -> RemoteFile:
    """Return a file of the Hub's list, if its name is safe and its size and hash are known."""
    name, sha256 = listed.rfilename, listed.lfs.sha256 if listed.lfs else None
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(
            f"{constants.ENDPOINT} lists {name!r} for {what}, which would be written outside of its directory;"
            " nothing was downloaded: check HF_ENDPOINT"
        )
    if listed.size is None or not (sha256 or listed.blob_id):
        raise UserError(
            f"{constants.ENDPOINT} lists {name} of {what} without size or hash, so it cannot be checked: set"
            " HF_ENDPOINT to the Hub or to a mirror that lists them"
        )
    return RemoteFile(name, listed.size, listed.blob_id, sha256)


def refuse_if_offline(what: str) -> None:
    """Raise UserError if requests to the Hub are forbidden."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{what} is not on the volume, and nothing may be downloaded (offline: true in config.yaml, or"
            " HF_HUB_OFFLINE): copy it to the volume, or allow downloads"
        )


def headers() -> dict[str, str]:
    """Return the headers of a request, with the user's token if there is one."""
    return dict(build_hf_headers(library_name="snakemake-rlhf"))


@contextmanager
def explained(
    repo_type: str, repository: str, revision: str, commit: str | None = None, file: str | None = None
) -> Iterator[None]:
    """Turn the client's errors into sentences, or into `Transient` if another attempt may succeed.

    Args:
        repo_type: model or dataset.
        revision: as the user wrote it.
        commit: the recorded commit of the revision.
        file: the requested file.
    """
    what = f"{file} of {repo_type} {repository}" if file else f"{repo_type} {repository}"
    page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repository}"
    token = "HF_TOKEN is set" if headers().get("authorization") else "HF_TOKEN is not set"
    try:
        yield
    except RevisionNotFoundError:
        raise _no_revision(f"{repo_type} {repository}", page, revision, commit) from None
    except EntryNotFoundError:
        raise _no_file(f"{repo_type} {repository}", commit, file) from None
    except HfHubHTTPError as error:
        raise _refused(error, what, page, token) from None
    except http.HTTPError as error:
        raise _unreachable(error) from None
    except json.JSONDecodeError:
        raise UserError(
            f"{constants.ENDPOINT} does not speak the Hub's protocol: check HF_ENDPOINT, and whether a proxy"
            " responds instead"
        ) from None
    except UnicodeEncodeError:
        raise UserError(
            "HF_TOKEN contains a character that no token has: copy it from the Hub again"
        ) from None
    except (ValueError, http.InvalidURL) as error:
        raise UserError(
            f"cannot request {what} from {constants.ENDPOINT} ({error}): HF_ENDPOINT, HTTPS_PROXY, HTTP_PROXY"
            " and ALL_PROXY should be addresses such as http://name:port"
        ) from None


def _unreachable(error: Any) -> Exception:
    """Return the error for a server that did not respond."""
    # Not always the Hub itself: it redirects to other servers for large files.
    server = f"{error.request.url.scheme}://{error.request.url.netloc.decode()}"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return UserError(
            f"the certificate of {server} is not trusted ({error}): if a proxy or mirror has its own"
            " certificate authority, set SSL_CERT_FILE to a file with the authority's certificate"
        )
    refused = re.match(r"\d{3}", str(error)) if isinstance(error, http.ProxyError) else None
    if refused and int(refused[0]) not in BUSY:
        return UserError(_proxy_refused(server, str(error).strip()))
    return Transient(
        f"cannot reach {server} ({type(error).__name__}: {error}): check the network, HTTPS_PROXY and HF_ENDPOINT"
    )


def _proxy_refused(server: str, status: str) -> str:
    """Return the message for a proxy that refuses to connect."""
    if status.startswith("407"):
        return (
            f"the proxy requires a name and password to connect to {server} ({status}): set HTTPS_PROXY"
            " to http://name:password@proxy:port"
        )
    return (
        f"the proxy does not connect to {server} ({status}): have the server allowed there, set HTTPS_PROXY to"
        " another proxy, or add the server to NO_PROXY if it can be reached without one"
    )


def _no_revision(source: str, page: str, revision: str, commit: str | None) -> Exception:
    """Return the error for a revision, or a recorded commit, that does not exist."""
    if commit and commit != revision:
        return UserError(
            f"{source} no longer has commit {commit}, which rlhf.lock records for revision {revision}: to use"
            f" what {revision} means now, remove its line from rlhf.lock and its directory under work/"
        )
    return UserError(f"{source} has no revision {revision}: choose a branch, tag or commit listed at {page}")


def _no_file(source: str, commit: str | None, file: str | None) -> Exception:
    """Return the error for a file, or a whole source, that does not exist."""
    if file:
        return UserError(
            f"{source} at {commit} lacks a file that it lists, {file}: choose another revision, or"
            " check HF_ENDPOINT if it is a mirror"
        )
    return UserError(f"{constants.ENDPOINT} does not know {source}: check HF_ENDPOINT")


def _refused(error: HfHubHTTPError, what: str, page: str, token: str) -> Exception:
    """Return the error for a request that was refused: `Transient` if another attempt may succeed."""
    if isinstance(error, GatedRepoError):
        return UserError(
            f"{what} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that"
            f" account ({token})"
        )
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"there is no {what} at {constants.ENDPOINT}, or it is private: check the name; for a private one"
            f" set HF_TOKEN to a token that may read it ({token})"
        )
    return _by_status(error, what, token)


def _by_status(error: HfHubHTTPError, what: str, token: str) -> Exception:
    status = error.response.status_code
    if status in BUSY:
        return Transient(
            f"{constants.ENDPOINT} responded {status} for {what}", requested_wait(error.response)
        )
    if status == 407:
        return UserError(_proxy_refused(constants.ENDPOINT, f"{status} {error.response.reason_phrase}"))
    if status in (401, 403):
        return UserError(
            f"{constants.ENDPOINT} refused {what} ({status}): check the token, which may be wrong, expired or"
            f" without the right to read it ({token}); a proxy or a mirror may also remove it"
        )
    return UserError(
        f"{constants.ENDPOINT} responded {status} for {what} ({error.response.reason_phrase}): try again later,"
        " or check HF_ENDPOINT"
    )


def requested_wait(response: Any) -> float | None:
    """Return the seconds to wait that a `Retry-After` or the Hub's `RateLimit` header requests, or None."""
    value = response.headers.get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    limit = parse_ratelimit_headers(response.headers)
    return limit.reset_in_seconds + 1.0 if limit and not limit.remaining else None
