"""Lists and files by HTTPS through a proxy that tunnels, with a certificate of one's own authority."""

from __future__ import annotations

import random
import ssl

import pytest
import trustme
from hub_proxy import Proxy
from hub_server import HubServer
from huggingface_hub import close_session, constants

from rlhf.errors import UserError
from rlhf.sources import download, hub, retry

NAMES = ["README.md", "rows.data"]
HUB = "https://hub.invalid"  # a name that only the proxy knows


@pytest.fixture
def tls(tmp_path, monkeypatch):
    """The server's side of TLS; users trust it as they trust a company's authority."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("hub.invalid", "localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    return context


@pytest.fixture
def server(tmp_path, tls):
    folder = tmp_path / "hub/datasets/a/b"
    folder.mkdir(parents=True)
    (folder / "rows.data").write_bytes(random.Random(1).randbytes(1_000_000))
    (folder / "README.md").write_text("a card")
    with HubServer(tmp_path / "hub", tls) as hub_server:
        yield hub_server


@pytest.fixture
def proxy(server, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(download, "CHUNK", 1 << 18)
    monkeypatch.setenv("HF_TOKEN", "")
    for name in ("NO_PROXY", "no_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Proxy(server.port) as tunnel:
        monkeypatch.setenv("HTTPS_PROXY", tunnel.endpoint)
        yield tunnel
        close_session()


def fetch(tmp_path, monkeypatch, endpoint):
    """Download what the server has, as a user does whose HF_ENDPOINT is `endpoint`."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    close_session()  # the client reads the variables when it is made
    download.download(hub.snapshot("dataset", "a/b", "main", None), NAMES, tmp_path / "here")
    return [(tmp_path / "here" / name).read_bytes() for name in NAMES]


def theirs(server):
    return [(server.root / "datasets/a/b" / name).read_bytes() for name in NAMES]


def test_lists_and_files_come_through_the_tunnel(tmp_path, monkeypatch, server, proxy):
    assert fetch(tmp_path, monkeypatch, HUB) == theirs(server)
    assert set(proxy.requests) == {"hub.invalid:443"}
    assert len(proxy.requests) <= download.STREAMS  # tunnels are used again


def test_what_no_proxy_names_is_requested_directly(tmp_path, monkeypatch, server, proxy):
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert fetch(tmp_path, monkeypatch, f"https://localhost:{server.port}") == theirs(server)
    assert proxy.requests == []


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (407, r"requires a name and password .* https://hub\.invalid \(407 .*\): set HTTPS_PROXY to"),
        (403, r"the proxy does not connect to https://hub\.invalid \(403 .*or add the server to NO_PROXY"),
        (503, r"cannot reach https://hub\.invalid \(ProxyError: 503 .* HTTPS_PROXY .*\(6 attempts\)"),
    ],
)
def test_a_proxy_that_refuses_is_reported_and_tried_again_only_if_that_may_help(
    tmp_path, monkeypatch, proxy, status, said
):
    proxy.status = status
    with pytest.raises(UserError, match=said) as caught:
        fetch(tmp_path, monkeypatch, HUB)
    assert ("attempts" in str(caught.value)) == (status == 503)


def test_a_proxy_that_is_not_there_is_reported(tmp_path, monkeypatch, proxy):
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot reach https://hub\.invalid .*refused.*check .* HTTPS_PROXY"):
        fetch(tmp_path, monkeypatch, HUB)


def test_an_authority_that_nobody_trusts_is_reported_at_once(tmp_path, monkeypatch, proxy):
    monkeypatch.delenv("SSL_CERT_FILE")
    said = r"certificate of https://hub\.invalid is not .*set SSL_CERT_FILE"
    with pytest.raises(UserError, match=said) as caught:
        fetch(tmp_path, monkeypatch, HUB)
    assert "attempts" not in str(caught.value)
