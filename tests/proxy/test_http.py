# SPDX-License-Identifier: MIT
"""The proxy as a real nginx runs it: who gets in, what passes, how answers stream, and what a reload costs."""

from __future__ import annotations

import base64
import http.client
import json
import os
import select
import socket
import ssl
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from operations.containers.proxy import Proxy
from operations.containers.remote import proxy as program
from operations.containers.remote import proxy_state
from operations.containers.remote.proxy import Failed
from tests.proxy.real import Backend, Guest, backend, free_port, guest, proxy_of, served

ASTRO, ML, OTHER = "astro-Token_0123456789abcdefABCDEF", "ml-Token_0123456789abcdefABCDEF", "other-service-0123456789"


@dataclass
class Site:
    guest: Guest
    port: int
    backend: type[Backend]

    def proxy(self, astro: list[str] | None = None, **keys: object) -> Proxy:
        tenants = {"astro": [ASTRO] if astro is None else astro, "ml": [ML]}
        return proxy_of(self.guest, served("ollama", self.port, tenants), **keys)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    port = free_port()
    with guest(monkeypatch) as made, backend(port) as behind:
        found = Site(made, port, behind)
        made.apply(found.proxy())
        yield found


def test_a_token_lets_its_tenant_in_and_goes_no_further(site: Site) -> None:
    status, headers, body = site.guest.ask(site.port, f"/api/tags?key={ASTRO}", ASTRO)

    assert (status, json.loads(body)) == (200, {"path": "/api/tags"})
    _method, _path, seen = site.backend.seen[0]
    assert "authorization" not in seen and ASTRO not in str(seen)
    assert seen["x-request-id"] == headers["x-request-id"]
    assert "nginx/" not in headers["server"]
    line = site.guest.log()[-1]
    assert line["tenant"] == "astro" and line["service"] == "ollama" and line["request"] == headers["x-request-id"]
    assert (line["method"], line["path"], line["status"], line["client"]) == ("GET", "/api/tags", 200, "127.0.0.1")
    assert line["bytes"] > 0 and line["seconds"] >= 0


@pytest.mark.parametrize(
    "token", [None, "", OTHER, ASTRO.swapcase(), ASTRO[:-1], ASTRO + "x", f"{ASTRO} {ML}", ".*", "^", "%"]
)
def test_everything_else_is_401(site: Site, token: str | None) -> None:
    status, headers, body = site.guest.ask(site.port, "/api/tags", token)

    assert status == 401
    assert headers["www-authenticate"] == 'Bearer realm="ollama"'
    assert headers["content-type"] == "application/json"
    assert "token" in json.loads(body)["error"]
    assert site.backend.seen == []
    assert site.guest.log()[-1]["tenant"] == ""


def test_other_schemes_are_no_token(site: Site) -> None:
    for value in (ASTRO, f"Basic {ASTRO}", f"xBearer {ASTRO}", f"Bearer {ASTRO}, Bearer {ML}"):
        assert site.guest.ask(site.port, "/api/tags", Authorization=value)[0] == 401
    assert site.guest.ask(site.port, "/api/tags", Authorization=f"bearer {ASTRO}")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *(f"/api/{name}" for name in ("pull", "push", "create", "copy", "delete", "blobs/sha256:00", "me", "signout")),
        *("/api/%70ull", "//api/pull", "/api/tags/../pull", "/api/tags/%2e%2e/pull", "/api%2Fpull", "/api/pull/"),
        *("/api/tags/x", "/API/tags", "/api/tags%00", "/metrics", "/v1/models/../../api/pull", "/v1/files", "/x#/y"),
        *("/v1/models/%2e%2e/%2e%2e/api/pull", "/v1/models/..%2f..%2fapi%2fpull", "/api/tags#/../pull"),
    ],
)
def test_only_what_users_need_is_open(site: Site, path: str) -> None:
    status, _, body = site.guest.ask(site.port, path, ASTRO, method="POST", body=b"{}")

    # What nginx takes for another path reaches the service as that one.
    if status == 200:
        assert [seen[1].partition("?")[0] for seen in site.backend.seen] == ["/api/tags"]
        return
    assert status in (400, 403) and site.backend.seen == []
    assert status == 400 or "not open to users" in json.loads(body)["error"]


@pytest.mark.parametrize("path", ["/api/version", "/v1/models", "/v1/models/library/tiny:latest", "/"])
def test_what_users_need_passes_unchanged(site: Site, path: str) -> None:
    assert json.loads(site.guest.ask(site.port, path, ML)[2]) == {"path": path}


def test_parts_of_an_answer_come_one_by_one(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service says the next part when the one before has arrived."""
    received, passed, parts = threading.Semaphore(0), list[bool](), list[int]()
    monkeypatch.setattr(site.backend, "pause", lambda _: passed.append(received.acquire(timeout=10)))
    connection = site.guest.connection(site.port)
    connection.request("POST", "/api/chat", b"{}", {"Authorization": f"Bearer {ASTRO}", "Accept-Encoding": "gzip"})
    answer = connection.getresponse()
    assert answer.getheader("Content-Encoding") is None
    while line := answer.readline():
        parts.append(json.loads(line)["part"])
        received.release()
    connection.close()

    assert (parts, passed) == (list(range(Backend.PARTS)), [True] * Backend.PARTS)


def test_body_and_pace_have_limits(site: Site) -> None:
    status, _, body = site.guest.ask(site.port, "/api/generate", ASTRO, "POST", b"x" * (2**20 + 1))
    assert (status, "larger than 1 MiB" in json.loads(body)["error"]) == (413, True)

    site.guest.apply(site.proxy(requests_per_minute=60, burst=2))
    answers = [site.guest.ask(site.port, "/api/version", ASTRO) for _ in range(5)]
    assert [answer[0] for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1][1]["retry-after"] == "1" and "requests a minute" in json.loads(answers[-1][2])["error"]
    # Another tenant has a pace of its own.
    assert site.guest.ask(site.port, "/api/version", ML)[0] == 200
    assert [line["status"] for line in site.guest.log()][-2:] == [429, 200]


def test_no_burst_is_a_setting_too(site: Site) -> None:
    site.guest.apply(site.proxy(requests_per_minute=60, burst=0))
    assert [site.guest.ask(site.port, "/api/version", ASTRO)[0] for _ in range(2)] == [200, 429]


def test_silent_service_is_given_up_and_a_dead_one_said(site: Site) -> None:
    site.backend.PAUSE_S = 3
    site.guest.apply(site.proxy(read_timeout_s=1))
    connection = site.guest.connection(site.port)
    connection.request("POST", "/api/chat", b"{}", {"Authorization": f"Bearer {ASTRO}"})
    with pytest.raises(Exception, match=r"IncompleteRead|closed"):
        connection.getresponse().read()

    elsewhere = free_port()
    site.guest.apply(proxy_of(site.guest, served("ollama", elsewhere, {"astro": [ASTRO]})))
    status, _, body = site.guest.ask(elsewhere, "/api/version", ASTRO)
    assert (status, json.loads(body)) == (502, {"error": "ollama does not answer"})


def test_addresses_that_may_not_connect_get_nothing(site: Site) -> None:
    site.guest.apply(site.proxy(allowed=["192.0.2.0/24", "2001:db8::/32"]))
    assert site.guest.ask(site.port, "/api/version", ASTRO)[0] == 403
    assert site.guest.ask(site.port, "/api/version")[0] == 403

    site.guest.apply(site.proxy(allowed=["127.0.0.0/8"]))
    assert site.guest.ask(site.port, "/api/version", ASTRO)[0] == 200
    assert site.guest.ask(site.port, "/api/version")[0] == 401


def test_plain_http_and_old_tls_are_refused(site: Site) -> None:
    plain = http.client.HTTPConnection("127.0.0.2", site.port, timeout=5)
    plain.request("GET", "/api/version", headers={"Authorization": f"Bearer {ASTRO}"})
    answer = plain.getresponse()
    assert (answer.status, json.loads(answer.read())) == (400, {"error": "https:// is needed"})

    old = site.guest.context()
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    connection = http.client.HTTPSConnection("127.0.0.2", site.port, timeout=5, context=old)
    with pytest.raises(ssl.SSLError):
        connection.request("GET", "/api/version")


def test_secrets_lie_where_root_alone_reads(site: Site) -> None:
    folder = Path(site.guest.inside("/etc/nginx/gpulab/"))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert modes == {"ollama.tenants": 0o600, "server.key": 0o600, "server.pem": 0o644}
    assert ASTRO not in Path(site.guest.inside("/etc/nginx/conf.d/gpulab.conf")).read_text()
    assert stat.S_IMODE(os.stat(site.guest.inside("/var/log/nginx/gpulab.log")).st_mode) == 0o640


def test_no_token_enters_a_log(site: Site) -> None:
    site.guest.ask(site.port, f"/api/version?key={ASTRO}", ASTRO, "POST", b"secret-of-the-body")
    site.guest.ask(site.port, "/api/nothing", ML, "POST", b"secret-of-the-body")
    site.guest.ask(site.port, "/api/version", OTHER)
    time.sleep(0.1)

    texts = [path.read_text() for path in Path(site.guest.inside("/var/log/nginx/")).iterdir()]
    for secret in (ASTRO, ML, OTHER, "secret-of-the-body"):
        assert not any(secret in text for text in texts), secret


def test_new_files_are_tried_before_they_replace_the_old(site: Site) -> None:
    """A certificate that does not match its key: nginx goes on with what it had, before a single file is changed."""
    order, files = site.guest.order(site.proxy(astro=["another-token-0123456789"]))
    other = site.guest.authority.issue("other", ["other"])
    key = site.guest.inside("/etc/nginx/gpulab/server.key")
    files[key] = {"content": base64.b64encode(other.key.encode()).decode(), "mode": 0o600}
    before = {path: Path(path).read_bytes() for path in files}

    with pytest.raises(Failed, match=r"(?s)nginx refuses the new files.*key values mismatch"):
        program.apply(order, files)

    assert {path: Path(path).read_bytes() for path in files} == before
    assert site.guest.ask(site.port, "/api/version", ASTRO)[0] == 200
    assert not list(site.guest.root.glob("gpulab-nginx-*"))


def test_nginx_that_does_not_take_new_files_gets_the_old_ones_back(site: Site) -> None:
    """Its test says yes, and its master no: a port that somebody else has by then."""
    taken = free_port()
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.2", taken))
        stranger.listen()
        wanted = proxy_of(site.guest, served("ollama", taken, {"astro": ["another-token-0123456789"]}))
        order, files = site.guest.order(wanted, taken_s=1.0)
        before = {path: Path(path).read_bytes() for path in files}

        with pytest.raises(Failed, match=r"(?s)nginx does not run with the new files.*The files before are back"):
            program.apply(order, files)

    assert {path: Path(path).read_bytes() for path in files} == before
    assert site.guest.ask(site.port, "/api/version", ASTRO)[0] == 200


def test_the_running_configuration_tells_its_generation(site: Site) -> None:
    socket_path = site.guest.inside("/run/gpulab-proxy/generation.sock")
    first = proxy_state.running(socket_path)
    site.guest.apply(site.proxy(astro=["another-token-0123456789"]))

    assert first and proxy_state.running(socket_path) not in (None, first)
    pid_file = str(site.guest.root / "run/nginx.pid")
    before = program.accepting(pid_file)
    site.guest.apply(site.proxy())
    assert before and not before & program.accepting(pid_file)
    site.guest.stop()
    assert proxy_state.running(socket_path) is None


def test_two_tokens_are_valid_while_one_replaces_the_other(site: Site) -> None:
    new = "new-token-of-astro-0123456789"
    site.guest.apply(site.proxy(astro=[new, ASTRO]))
    assert [site.guest.ask(site.port, "/api/version", each)[0] for each in (ASTRO, new)] == [200, 200]
    site.guest.apply(site.proxy(astro=[new]))
    assert [site.guest.ask(site.port, "/api/version", each)[0] for each in (ASTRO, new)] == [401, 200]


def test_reload_under_load_drops_nothing(site: Site) -> None:
    """Clients that keep their connections, with streamed answers, through five reloads.

    As HTTP libraries do, they look whether a kept connection was closed before they use it again. Between that look
    and the request nginx may still close it, right behind the last line of an answer too: the one thing that a reload
    can cost, once a connection. How often it does is up to the machine's load.
    """
    end = time.monotonic() + 6
    reloads = 5
    lost: list[str] = []
    raced: list[tuple[int, str]] = []
    done = [0] * 8

    def client(number: int) -> None:
        connection = site.guest.connection(site.port)
        while time.monotonic() < end:
            if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
                connection.close()
            kept = connection.sock is not None
            try:
                connection.request("POST", "/api/chat", b"{}", {"Authorization": f"Bearer {ASTRO}"})
                answer = connection.getresponse()
                lines = answer.read().splitlines()
                if answer.status != 200 or len(lines) != Backend.PARTS:
                    lost.append(f"{answer.status}: {lines}")
                done[number] += 1
            except (OSError, http.client.HTTPException) as error:
                before_any_answer = isinstance(
                    error, http.client.RemoteDisconnected | ssl.SSLEOFError | ConnectionError
                )
                if kept and before_any_answer:
                    raced.append((number, repr(error)))
                else:
                    lost.append(repr(error))
                connection.close()
        connection.close()

    site.backend.PAUSE_S = 0.05
    clients = [threading.Thread(target=client, args=(number,)) for number in range(len(done))]
    for each in clients:
        each.start()
    for number in range(reloads):
        time.sleep(0.8)
        site.guest.apply(site.proxy(astro=[ASTRO, f"another-token-{number}-0123456789"]))
    for each in clients:
        each.join()

    assert lost == []
    assert max(Counter(client for client, _ in raced).values(), default=0) <= reloads, raced
    assert min(done) >= reloads, done
