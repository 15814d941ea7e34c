# SPDX-License-Identifier: MIT
"""What reads the proxy from outside, before a real nginx: rotation's try of a token, and verify's readers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import inventory
from inventory import GpulabError, Guest, Lab
from inventory.secrets import Secrets
from operations.containers.authority import Authority
from operations.containers.proxy import proxy_of
from operations.containers.rotate import Target, begin, try_out
from tests.proxy.real import ADDRESS, backend, free_port, guest
from tests.proxy.real import Guest as Real
from tests.unit.test_inventory import GUEST, IMAGE, lab_file
from verify.containers import access, access_remote


@dataclass
class Site:
    real: Real
    lab: Lab
    guest: Guest

    def deploy(self, **keys: object) -> None:
        self.real.apply(replace(proxy_of(self.lab, self.guest), **keys))

    def on_guest(self) -> dict[str, object]:
        log = self.real.inside(access.LOG)
        folder = self.real.inside(f"{access.FOLDER}/")
        requests = list(access.requests_of(access.observe(self.lab, self.guest)))
        return access_remote.observe({"folder": folder, "log": log, "requests": requests})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    port = free_port()
    declared = {
        **GUEST,
        "address": f"{ADDRESS}/24",
        "gateway": "127.0.0.1",
        "distribution": "debian12",
        "services": {"ollama": {"image": IMAGE, "port": port}},
        "tenants": [{"name": "astro"}, {"name": "ml", "services": []}],
        "state_dir": str(tmp_path / "state"),
    }
    lab = inventory.load(lab_file(tmp_path, guests={"gpu01": declared}))
    with guest(monkeypatch) as real, backend(port):
        found = Site(real, lab, lab.guests["gpu01"])
        found.deploy()
        yield found


def test_verify_sees_who_is_let_in(site: Site) -> None:
    # A token of times when it might use the service.
    Secrets(site.guest.state).put("pve1", "token.ollama.ml", "a-token-of-yesterday-0123456789", "gpu01")

    found = access.observe(site.lab, site.guest)["ollama"]

    assert found["tls"]["error"] == "" and found["tls"]["protocol"] == "TLSv1.3" and found["tls"]["days"] > 390
    strangers = found["answers"]["strangers"]
    assert set(strangers) == {"nobody", "a stranger", "ml, who may not use it"}
    assert {(each["status"], each["challenge"]) for each in strangers.values()} == {(401, 'Bearer realm="ollama"')}
    assert found["answers"]["tenants"]["astro"]["status"] == 200
    assert found["answers"]["managing"]["status"] == 403


def test_verify_sees_a_certificate_of_somebody_else(site: Site, tmp_path: Path) -> None:
    site.deploy(pair=Authority(tmp_path / "other").issue("gpu01", [ADDRESS]))
    found = access.observe(site.lab, site.guest)["ollama"]
    assert "self-signed certificate" in found["tls"]["error"]
    assert found["answers"]["tenants"]["astro"]["status"] == 0

    site.deploy(pair=Authority(site.guest.services_ca.parent).issue("elsewhere", ["192.0.2.7"]))
    assert "IP address mismatch" in access.observe(site.lab, site.guest)["ollama"]["tls"]["error"]


def test_verify_finds_its_requests_in_the_log(site: Site) -> None:
    log = site.on_guest()["log"]
    assert isinstance(log, dict)
    assert (log["mode"], log["broken"]) == (0o640, 0)
    assert [line["tenant"] for line in log["lines"]] == ["astro"]


def test_verify_knows_whose_a_listener_is(site: Site) -> None:
    with socket.socket() as open_:
        open_.bind(("0.0.0.0", 0))
        open_.listen()
        port = open_.getsockname()[1]
        found = {each["port"]: each for each in access_remote.listening(Path("/"))}
    assert found[port]["address"] == "0.0.0.0" and "py" in found[port]["program"]


def test_new_token_is_tried_before_the_old_one_ends(site: Site) -> None:
    secrets, chosen = Secrets(site.guest.state), [Target("ollama", "astro")]
    begin(secrets, "pve1", "gpu01", chosen)
    with pytest.raises(GpulabError, match=r"the previous one stays valid beside it\n.*HTTP 401, expected 200"):
        try_out(site.guest, "pve1", secrets, chosen)

    site.deploy()
    try_out(site.guest, "pve1", secrets, chosen)
    site.real.stop()
    with pytest.raises(GpulabError, match="Connection refused"):
        try_out(site.guest, "pve1", secrets, chosen)
