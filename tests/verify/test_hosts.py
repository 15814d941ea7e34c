# SPDX-License-Identifier: MIT
"""Connections: strict host keys, one a host, and failures in words."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest

import inventory
from inventory import Node
from inventory.secrets import Secrets
from tests.verify.healthy import GUEST, lab_file, verify
from tests.verify.ssh_server import SshServer
from verify.benchmarks.contract import TOOLS
from verify.containers import indexes
from verify.hosts import Connection, Unreachable, Unreadable
from verify.readers import Readers


@pytest.fixture
def server() -> Iterator[SshServer]:
    with SshServer() as running:
        yield running


@pytest.fixture
def client_key(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    paramiko.RSAKey.generate(2048).write_private_key_file(str(path))
    return path


def node_at(folder: Path, port: int, known_hosts: str = "") -> Node:
    """A declared node on a loopback port, with the lab's known_hosts."""
    lab = inventory.load(lab_file(folder, node={"ssh_hostname": "127.0.0.1", "ssh_port": port}))
    (folder / "state/known_hosts").write_text(known_hosts)
    return lab.nodes["pve1"]


def script(folder: Path, text: str) -> Path:
    path = folder / "remote.py"
    path.write_text(text)
    return path


def refused(connection: Connection) -> Unreachable:
    with pytest.raises(Unreachable) as caught:
        connection.open()
    return caught.value


def test_pinned_host_is_read_over_one_connection(tmp_path: Path, server: SshServer, client_key: Path) -> None:
    connection = Connection(node_at(tmp_path, server.port, server.line()))
    echo = script(tmp_path, "import json, sys\nprint(json.dumps({'given': json.loads(sys.argv[1])}))")

    given = {"quotes": 'it\'s "odd" $HOME `id`', "word": "Zürich"}
    assert connection.read(echo, given) == {"given": given}
    assert connection.read(echo, {})["given"] == {}
    assert server.connections == 1
    connection.close()


def test_secrets_go_over_stdin_and_to_one_read_alone(tmp_path: Path, server: SshServer, client_key: Path) -> None:
    connection = Connection(node_at(tmp_path, server.port, server.line()))
    echo = script(tmp_path, "import json, sys\nprint(json.dumps({'stdin': sys.stdin.read(), 'words': sys.orig_argv}))")

    found = connection.read(echo, {}, secret={"root": "hidden"})

    assert found["stdin"] == '{"root": "hidden"}'
    assert not [word for word in found["words"] if "hidden" in word]
    assert connection.read(echo, {})["stdin"] == ""
    connection.close()


def test_two_reads_at_once_have_a_channel_each(tmp_path: Path, server: SshServer, client_key: Path) -> None:
    """Each with its own secret and its own limit, over one connection that both of them may have to open."""
    connection = Connection(node_at(tmp_path, server.port, server.line()))
    meeting = script(
        tmp_path,
        "import json, os, sys, time\n"
        "arguments = json.loads(sys.argv[1])\n"
        "open(arguments['mine'], 'w').close()\n"
        "while not os.path.exists(arguments['other']): time.sleep(0.01)\n"
        "print(json.dumps({'stdin': sys.stdin.read()}))",
    )
    paths = [str(tmp_path / name) for name in ("a", "b")]

    def read(mine: str, other: str) -> dict[str, Any]:
        return connection.read(meeting, {"mine": mine, "other": other}, limit_s=30.0, secret={"of": mine})

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(read, paths, reversed(paths)))

    assert [json.loads(each["stdin"]) for each in found] == [{"of": path} for path in paths]
    assert server.connections == 1
    connection.close()


def test_services_are_read_beside_the_card_unless_it_is_measured(tmp_path: Path) -> None:
    lab = inventory.load(lab_file(tmp_path))

    def lanes(benchmarks: str) -> set[str]:
        made = Readers(lab, benchmarks)
        return {made.lane("gpu01", subject) for subject in ("system", "nvidia", "access", "milvus", "pytorch")}

    assert lanes("off") == {"gpu01", "beside gpu01"}
    assert lanes("quick") == lanes("full") == {"gpu01"}


def test_unknown_host_key_is_refused(tmp_path: Path, server: SshServer, client_key: Path) -> None:
    error = refused(Connection(node_at(tmp_path, server.port)))

    assert f"pve1: no host key of root@127.0.0.1:{server.port} is pinned in {tmp_path}/state/known_hosts" in str(error)
    assert "make bootstrap" in error.fix


def test_changed_host_key_is_refused(tmp_path: Path, server: SshServer, client_key: Path) -> None:
    other = paramiko.RSAKey.generate(2048)

    error = refused(Connection(node_at(tmp_path, server.port, server.line(other))))

    assert "shows another host key than the one pinned" in str(error)
    assert "find out who answers there" in error.fix


def test_users_own_ssh_configuration_does_not_weaken_it(
    tmp_path: Path, server: SshServer, client_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/config").write_text("Host *\n  StrictHostKeyChecking no\n")
    (tmp_path / ".ssh/known_hosts").write_text(server.line())
    monkeypatch.setenv("HOME", str(tmp_path))

    assert "no host key" in str(refused(Connection(node_at(tmp_path, server.port))))


def test_refused_key_is_named(tmp_path: Path, client_key: Path) -> None:
    with SshServer(accepts=False) as server:
        error = refused(Connection(node_at(tmp_path, server.port, server.line())))

    assert f"refuses the key {client_key}" in str(error)
    assert error.fix == "ssh-copy-id root@127.0.0.1"


def test_closed_port_is_tried_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    connection = Connection(node_at(tmp_path, port, "unused"))

    error = refused(connection)

    assert str(error) == f"pve1: no SSH to root@127.0.0.1:{port}: Connection refused"
    assert refused(connection) is error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise SystemExit('no such thing')", "failed: no such thing"),
        ("print('words')", "gave no JSON: 'words"),
        ("import time; time.sleep(9)", "took more than 1 s"),
    ],
)
def test_read_that_does_not_end_well_says_so(
    tmp_path: Path, server: SshServer, client_key: Path, text: str, said: str
) -> None:
    connection = Connection(node_at(tmp_path, server.port, server.line()))

    with pytest.raises(Unreadable, match=f"reading {tmp_path.name} of pve1 {said}"):
        connection.read(script(tmp_path, text), {}, limit_s=1)
    connection.close()


def test_lines_of_stderr_are_told_while_the_read_goes_on(tmp_path: Path, server: SshServer, client_key: Path) -> None:
    """The host goes on only after its line has arrived."""
    connection = Connection(node_at(tmp_path, server.port, server.line()))
    waits = """
import json, pathlib, sys, time
print("Z\u00fcrich: half", "way", file=sys.stderr, flush=True)
while not pathlib.Path(json.loads(sys.argv[1])["heard"]).exists():
    time.sleep(0.01)
sys.stderr.write("done\\nno line")
print(json.dumps({}))
"""
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        (tmp_path / "heard").touch()

    assert connection.read(script(tmp_path, waits), {"heard": str(tmp_path / "heard")}, tell=tell) == {}

    assert told == ["Zürich: half way", "done"]
    # Only who asked is told.
    connection.read(script(tmp_path, "import sys; print('odd', file=sys.stderr); print('{}')"), {})
    assert len(told) == 2
    connection.close()


@pytest.mark.parametrize("order", [("stdout", "stderr"), ("stderr", "stdout")])
def test_neither_stream_holds_up_the_other(
    tmp_path: Path, server: SshServer, client_key: Path, order: tuple[str, str]
) -> None:
    """Each is more than SSH has room for."""
    connection = Connection(node_at(tmp_path, server.port, server.line()))
    size = 3 * paramiko.common.DEFAULT_WINDOW_SIZE
    text = "import sys\n" + "".join(f"sys.{each}.write('x' * {size}); sys.{each}.flush()\n" for each in order)

    status, stdout, stderr = connection.run("much", ["python3", "-c", text], b"", 20.0)

    assert (status, len(stdout), len(stderr)) == (0, size, size)
    connection.close()


def test_read_that_says_how_far_it_is_may_take_longer(tmp_path: Path, server: SshServer, client_key: Path) -> None:
    connection = Connection(node_at(tmp_path, server.port, server.line()))
    talks = (
        "import sys, time\nfor n in range(12):\n    time.sleep(.25); print(n, file=sys.stderr, flush=True)\nprint('{}')"
    )

    assert connection.read(script(tmp_path, talks), {}, limit_s=2) == {}
    connection.close()


def test_connection_that_breaks_during_a_read_is_told(tmp_path: Path, client_key: Path) -> None:
    with SshServer() as server:
        connection = Connection(node_at(tmp_path, server.port, server.line()))
        lost = "import sys, time; print('begun', file=sys.stderr, flush=True); time.sleep(3)"

        with pytest.raises(Unreadable, match=f"reading {tmp_path.name} of pve1 failed|the connection broke"):
            connection.read(script(tmp_path, lost), {}, tell=lambda line: server.drop())
    connection.close()


def test_file_is_sent_into_a_private_folder(tmp_path: Path, server: SshServer, client_key: Path) -> None:
    connection = Connection(node_at(tmp_path, server.port, server.line()))

    folder = Path(connection.send("remote.py", b"text"))

    try:
        assert (folder / "remote.py").read_text() == "text"
        assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        connection.close()
        (folder / "remote.py").unlink()
        folder.rmdir()


def test_scripts_run_over_ssh_as_they_are_sent(tmp_path: Path, server: SshServer, client_key: Path) -> None:
    """This machine is no node; its reads come to an end all the same."""
    node_at(tmp_path, server.port, server.line())
    lab = inventory.load(tmp_path / "lab.py")
    readers = Readers(lab)

    found = readers.read("pve1", "hypervisor")

    assert found["cmdline"] and found["kernel"]
    assert found["pve_version"] == ""
    readers.close()


def test_benchmarks_go_over_ssh_as_one_text(tmp_path: Path, server: SshServer, client_key: Path) -> None:
    """The whole program, which no command line would hold; with or without a card here it comes to its end."""
    at = {"ssh_hostname": "127.0.0.1", "ssh_port": server.port, "ssh_user": "root", "ssh_key": str(client_key)}
    alone = {**GUEST["nvidia"], "sharing": "time-slice"}
    lab = inventory.load(lab_file(tmp_path, guest={**at, "nvidia": alone}))
    (tmp_path / "state/known_hosts").write_text(server.line())
    told: list[tuple[str, str]] = []
    readers = Readers(lab, tell=lambda host, line: told.append((host, line)))

    found = readers.read("gpu01", "gpubench")

    readers.close()
    assert ("gpu01", f"{found['verdict']}: {found['reason']}") in told or found["verdict"] == "measured"
    assert told
    assert found["tool"] == "gpubench" and found["quick"] is True
    assert found["metrics"].keys() | found["not_run"].keys() == TOOLS["gpubench"].keys()


def test_milvus_is_asked_with_the_labs_secrets_and_tells_them_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = inventory.load(lab_file(tmp_path))
    kept = Secrets(lab.guests["gpu01"].state)
    root = kept.once("pve1", "milvus.root", "gpu01")
    astro = kept.once("pve1", "milvus.astro", "gpu01")
    asked: list[tuple[str, dict[str, Any], Any]] = []

    def read(self: Connection, file: Path, arguments: dict[str, Any], limit_s: float, secret: object) -> dict[str, Any]:
        asked.append((file.name, arguments, secret))
        return {}

    monkeypatch.setattr(Connection, "read", read)
    Readers(lab).read("gpu01", "milvus")

    ((name, arguments, secret),) = asked
    assert name == "milvus_remote.py"
    assert secret == {"root": root, "astro": astro, "ml": None}
    assert root not in str(arguments) and astro not in str(arguments)
    search = {"dimension": 128, "metric": "L2", "top_k": 100, "search": {"itopk_size": 128}}
    assert arguments["databases"] == {"astro": {"spectra": search}, "ml": {}}


def test_graph_that_is_adapted_for_the_cpu_is_searched_as_the_cpus_own(tmp_path: Path) -> None:
    adapted = {"type": "GPU_CAGRA", "adapt_for_cpu": True, "ef": 128}
    services = {**GUEST["services"], "milvus": {**GUEST["services"]["milvus"], "indexes": {"sky": adapted}}}
    service = inventory.load(lab_file(tmp_path, guest={"services": services})).guests["gpu01"].services.milvus

    assert service is not None
    assert indexes.to_be_searched(service, "astro")["spectra"]["search"] == {"ef": 128}
    assert indexes.built(service.indexes["sky"])["adapt_for_cpu"] == "true"


def test_run_against_a_host_that_is_down_names_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stand-in for the reads here: the whole way, against a closed port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    node = {"ssh_hostname": "127.0.0.1", "ssh_port": port, "api": {"port": port}}

    run = verify(lab_file(tmp_path, node=node), "--limit", "pve1")

    assert run.ids("fail") == {"hypervisor.reachable", "vm.api.reachable"}
    assert run.result("hypervisor.reachable")["message"].endswith("Connection refused")
    assert run.result("hypervisor.iommu.on")["message"] == "pve1 is not reachable"
    assert run.status == 1
    assert "Traceback" not in capsys.readouterr().out
