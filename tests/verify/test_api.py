# SPDX-License-Identifier: MIT
"""The reads of the Proxmox API, against a small TLS server that answers as PVE does."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import inventory
from inventory import Lab
from rehearsal import ca
from tests.verify.healthy import TOKEN, healthy, lab_file
from verify.hosts import Unreadable
from verify.vm.api import Api, options, size_gib


class Pve(ThreadingHTTPServer):
    """Answers `paths` to whoever shows the token; keeps what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = TOKEN
        self.paths: dict[str, Any] = {}
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Pve

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.removeprefix("/api2/json")
        self.server.asked.append(path)
        if self.headers["Authorization"] != f"PVEAPIToken={self.server.token}":
            self.send_response_only(401, "invalid token value!")
            self.end_headers()
            return
        answer = self.server.paths.get(path)
        if isinstance(answer, tuple):
            self.send_response_only(*answer)
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"data": answer}).encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def pve(tmp_path: Path) -> Iterator[Pve]:
    authority = ca.authority(tmp_path / "state/ca")
    (tmp_path / "state/ca/pve1.pem").write_bytes(authority.certificate.read_bytes())
    issued = authority.issue("front", ["127.0.0.1"])
    server = Pve()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certificate, issued.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    found = healthy()["vm"]
    server.paths = {
        "/version": {"version": "9.1.4"},
        "/nodes/pve1/qemu/101/config?current=1": found["config"],
        "/nodes/pve1/qemu/101/status/current": {"status": "running"},
        "/nodes/pve1/qemu/101/pending": [
            {"key": "cores", "value": 8},
            {"key": "memory", "value": "16384", "pending": "8192"},
            {"key": "balloon", "value": 0, "delete": 1},
        ],
        "/nodes/pve1/qemu/101/agent/ping": {"result": {}},
        "/cluster/mapping/pci/a4000": {"id": "a4000", "map": found["mapping"]},
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def lab(tmp_path: Path, pve: Pve) -> Lab:
    return inventory.load(
        lab_file(tmp_path, node={"api": {"host": "127.0.0.1", "port": pve.server_port, "timeout_s": 5}})
    )


def api_of(lab: Lab) -> Api:
    return Api(lab.nodes["pve1"])


def test_vm_is_read_as_it_is_now(lab: Lab, pve: Pve) -> None:
    found = api_of(lab).read_vm(lab.guests["gpu01"])

    assert found == {**healthy()["vm"], "pending": ["memory", "balloon"]}


@pytest.mark.parametrize(
    "answer", [(500, "QEMU guest agent is not running"), (403, "Permission check failed (/vms/101, VM.Monitor)")]
)
def test_agent_that_does_not_answer_is_told(lab: Lab, pve: Pve, answer: tuple[int, str]) -> None:
    pve.paths["/nodes/pve1/qemu/101/agent/ping"] = answer

    assert answer[1] in api_of(lab).read_vm(lab.guests["gpu01"])["agent"]


def test_agent_of_a_stopped_vm_is_not_asked(lab: Lab, pve: Pve) -> None:
    pve.paths["/nodes/pve1/qemu/101/status/current"] = {"status": "stopped"}

    assert api_of(lab).read_vm(lab.guests["gpu01"])["agent"] is None
    assert not [path for path in pve.asked if "agent" in path]


def test_api_is_asked_once_for_its_version(lab: Lab, pve: Pve) -> None:
    api = api_of(lab)

    assert api.reach()["version"] == "9.1.4"
    api.read_vm(lab.guests["gpu01"])
    assert pve.asked.count("/version") == 1


def test_revoked_token_is_told_without_the_token(lab: Lab, pve: Pve) -> None:
    pve.token = "gpulab@pve!gpulab=another"
    api = api_of(lab)

    found = api.reach()

    assert f"pve1: https://127.0.0.1:{pve.server_port} refuses the token gpulab@pve!gpulab" in found["error"]
    assert TOKEN.partition("=")[2] not in str(found)
    with pytest.raises(Unreadable, match="the API of pve1 refuses the token"):
        api.read_vm(lab.guests["gpu01"])


def test_certificate_of_another_ca_is_refused(lab: Lab, tmp_path: Path) -> None:
    other = ca.authority(tmp_path / "other")
    (tmp_path / "state/ca/pve1.pem").write_bytes(other.certificate.read_bytes())

    assert "does not check against" in api_of(lab).reach()["error"]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("secrets.json", "{}", "the API token is missing; looked in"),
        ("secrets.json", json.dumps({"pve1": {"-": {"api_token": "word"}}}), "the API token has the wrong form"),
        ("ca/pve1.pem", None, "no CA certificate"),
    ],
)
def test_what_is_missing_here_is_named(lab: Lab, tmp_path: Path, file: str, text: str | None, said: str) -> None:
    path = tmp_path / "state" / file
    if text is None:
        path.unlink()
    else:
        path.write_text(text)

    assert said in api_of(lab).reach()["error"]


def test_absent_vm_is_seen_as_absent(lab: Lab, pve: Pve) -> None:
    words = "Configuration file 'nodes/pve1/qemu-server/101.conf' does not exist"
    pve.paths["/nodes/pve1/qemu/101/config?current=1"] = (500, words)

    assert api_of(lab).read_vm(lab.guests["gpu01"]) == {"exists": False}


def test_missing_privilege_is_no_absence(lab: Lab, pve: Pve) -> None:
    pve.paths["/nodes/pve1/qemu/101/config?current=1"] = (403, "Permission check failed (/vms/101, VM.Audit)")

    with pytest.raises(Unreadable, match=r"403 .*VM\.Audit"):
        api_of(lab).read_vm(lab.guests["gpu01"])


def test_absent_mapping_is_none(lab: Lab, pve: Pve) -> None:
    pve.paths["/cluster/mapping/pci/a4000"] = (500, "mapping 'a4000' not found")

    assert api_of(lab).read_vm(lab.guests["gpu01"])["mapping"] is None


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("mapping=a4000,pcie=on", {"mapping": "a4000", "pcie": "1"}),
        ("0000:01:00.0,pcie=1", {"": "0000:01:00.0", "pcie": "1"}),
        ("q35", {"": "q35"}),
    ],
)
def test_options_as_pve_writes_them(text: str, meant: dict[str, str]) -> None:
    assert options(text) == meant


@pytest.mark.parametrize(("volume", "gib"), [("a:b,size=64G", 64), ("a:b,size=512M,ssd=1", 0.5), ("a:b", None)])
def test_size_of_a_volume(volume: str, gib: float | None) -> None:
    assert size_gib(volume) == gib
