# SPDX-License-Identifier: MIT
"""The lab on its control machine: names, addresses, processes, hosts' files; nothing here needs root."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from inventory import GpulabError
from rehearsal import host, lab, machine, network, paths, processes
from rehearsal.host import HostSpec
from rehearsal.processes import Process


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A lab of its own for each test."""
    monkeypatch.setenv("GPULAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPULAB_SUBNET", raising=False)
    yield paths.cache()
    processes.end_members(None, timeout=0)


def test_limit_of_inotify_is_raised_and_never_lowered(tmp_path):
    limit = tmp_path / "max_user_instances"
    said = []
    for before, after in ((128, 1024), (8192, 8192)):
        limit.write_text(f"{before}\n")
        machine.raise_limits(said.append, limit)
        assert int(limit.read_text()) == after
    assert said == ["raising fs.inotify.max_user_instances from 128 to 1024"]


def test_two_subnets_have_two_bridges(monkeypatch):
    assert network.current().bridge == "gpulab66-0"
    monkeypatch.setenv("GPULAB_SUBNET", "10.67.1.0/24")
    assert network.current().bridge == "gpulab67-1"
    assert network.current().address(101) == "10.67.1.101"
    assert network.current().mac == "02:67:0a:43:01:00"


@pytest.mark.parametrize("subnet", ["10.66.0.0/16", "10.66.0.1/24", "lab"])
def test_bad_subnet_is_refused_by_name(monkeypatch, subnet):
    monkeypatch.setenv("GPULAB_SUBNET", subnet)
    with pytest.raises(GpulabError, match=f"GPULAB_SUBNET={subnet}"):
        network.current()


def test_bridge_name_fits_the_kernels_limit(monkeypatch):
    monkeypatch.setenv("GPULAB_SUBNET", "172.255.255.0/24")
    assert len(network.current().bridge) <= 15


def test_stub_resolver_is_passed_over(tmp_path):
    stub, real = tmp_path / "stub", tmp_path / "real"
    stub.write_text("nameserver 127.0.0.53\nnameserver fe80::1\n")
    real.write_text("# from DHCP\nnameserver 192.0.2.53\n")
    assert network.resolvers((str(stub), str(tmp_path / "absent"), str(real))) == ["192.0.2.53"]


def test_no_resolver_says_what_to_do(tmp_path):
    stub = tmp_path / "stub"
    stub.write_text("nameserver 127.0.0.53\n")
    with pytest.raises(GpulabError, match="hint: a resolver on the loopback address"):
        network.resolvers((str(stub),))


def test_nodes_have_addresses_and_ports_in_order():
    plan = lab.plan(["pve1", "pve2"])
    assert [(entry.address, entry.front_port) for entry in plan.nodes] == [("10.66.0.11", 18006), ("10.66.0.12", 18007)]


def test_process_and_its_children_end_together():
    script = "import subprocess, sys, time; subprocess.Popen(['sleep', '600'], start_new_session=True); time.sleep(600)"
    processes.start("parent", [sys.executable, "-c", script])
    deadline = time.monotonic() + 10
    while len(processes.members("parent")) < 2:
        assert time.monotonic() < deadline
    assert processes.stop("parent")
    assert processes.members() == []
    assert not processes.running("parent")
    assert not processes.stop("parent")


def test_process_is_found_without_its_record():
    """`kill -9` of whoever starts it can come before the record is written."""
    pid = processes.start("lost", ["sleep", "600"])
    (paths.processes() / "lost.json").unlink()
    assert [process.pid for process in processes.members()] == [pid]


def test_recycled_pid_is_neither_running_nor_killed():
    child = subprocess.Popen(["sleep", "600"])
    try:
        paths.processes().mkdir(parents=True)
        (paths.processes() / "old.json").write_text(json.dumps({"pid": child.pid, "started": 1}))
        assert not processes.running("old")
        Process(child.pid, 1).send(signal.SIGKILL)
        processes.stop("old", timeout=0)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_other_labs_processes_are_not_ours(monkeypatch, tmp_path):
    processes.start("mine", ["sleep", "600"])
    # The other folder's name begins as ours does.
    monkeypatch.setenv("GPULAB_CACHE", str(tmp_path / "cache-2"))
    assert processes.members() == []
    monkeypatch.setenv("GPULAB_CACHE", str(tmp_path / "cache"))
    assert len(processes.members()) == 1


def test_second_process_of_a_name_is_refused():
    processes.start("one", ["sleep", "600"])
    with pytest.raises(GpulabError, match="one runs already"):
        processes.start("one", ["sleep", "600"])


def test_stubborn_process_is_killed():
    processes.start("stubborn", ["sh", "-c", "trap '' TERM; echo ready; while true; do sleep 0.1; done"])
    log = paths.logs() / "stubborn.log"
    deadline = time.monotonic() + 10
    while log.read_text() != "ready\n":
        assert time.monotonic() < deadline
    processes.stop("stubborn", timeout=0.1)
    assert processes.members() == []


def spec(**changes) -> HostSpec:
    values = {
        "name": "gpu01",
        "address": "10.66.0.101",
        "gateway": "10.66.0.1",
        "lower": paths.image("trixie") / "root",
        "upper": paths.lab() / "disks" / "101",
    }
    return HostSpec(**(values | changes))


def test_path_in_a_host_never_leads_out_of_it(tmp_path):
    root = tmp_path / "root"
    (root / "usr/lib").mkdir(parents=True)
    (root / "lib").symlink_to("usr/lib")
    (root / "run").mkdir()
    (root / "etc").mkdir()
    (root / "etc/resolv.conf").symlink_to("/run/stub")
    (root / "etc/up").symlink_to("../../../../../../etc/passwd")
    assert host.inside(root, "/lib/x") == root / "usr/lib/x"
    assert host.inside(root, "/etc/resolv.conf") == root / "run/stub"
    assert host.inside(root, "/etc/up") == root / "etc/passwd"
    assert host.inside(root, "/../../etc") == root / "etc"


def test_spec_survives_the_way_to_the_supervisor():
    given = spec(files={"/etc/x": ("text\n", 0o600)}, devices=[("/dev/sdb", "b", 7, 3)], seed={"user-data": "x"})
    assert host._from_plain(json.loads(json.dumps(host._plain(given)))) == given


def test_device_nodes_are_made_at_each_boot():
    assert host.devices_file(spec(devices=[("/dev/sdb", "b", 7, 3)])) == (
        "c! /dev/fuse 0666 root root - 10:229\nb! /dev/sdb 0660 root disk - 7:3\n"
    )


def test_container_under_systemd_gets_a_scope_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "_systemd_is_init", lambda: True)
    words = host.command(spec(), tmp_path)
    assert words[:4] == ["systemd-run", "--scope", "--quiet", "--collect"]
    assert f"--unit=gpu01-gpulab66-0-{os.getpid()}-1" in words
    monkeypatch.setattr(host, "_systemd_is_init", lambda: False)
    assert host.command(spec(), tmp_path)[0] == "setpriv"


def test_downloaded_packages_are_shared_without_copies():
    first, second = paths.lab() / "a", paths.lab() / "b"
    host.share_debs(first)
    (first / "new_1_all.deb").write_text("one")
    host.keep_debs(first)
    host.share_debs(second)
    assert (second / "new_1_all.deb").samefile(first / "new_1_all.deb")
    # A host's own file of the same name replaces the shared one, and the other host's copy stays as it is.
    (first / "new_1_all.deb").unlink()
    (first / "new_1_all.deb").write_text("two")
    host.keep_debs(first)
    assert (paths.debs() / "new_1_all.deb").read_text() == "two"
    assert (second / "new_1_all.deb").read_text() == "one"


def test_hosts_that_stop_together_share_the_same_download(monkeypatch):
    """All have fetched a newer package; none stumbles over another's half-done replacement."""
    link = os.link
    monkeypatch.setattr(host.os, "link", lambda *names: (link(*names), time.sleep(0.02)))
    folders = [paths.lab() / name for name in "abcd"]
    for folder in folders:
        folder.mkdir(parents=True)
        for number in range(4):
            (folder / f"same{number}_1_all.deb").write_text(folder.name)
    with ThreadPoolExecutor() as pool:
        list(pool.map(host.keep_debs, folders))
    assert {path.name for path in paths.debs().iterdir()} == {f"same{number}_1_all.deb" for number in range(4)}


def test_host_that_is_down_has_no_leader_and_stops_again():
    assert host.leader("gpu01") is None
    assert not host.running("gpu01")
    with pytest.raises(GpulabError, match="gpu01 is not up"):
        host.run("gpu01", ["true"])


def test_only_root_on_debian_may_run_the_lab(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(GpulabError, match="needs root"):
        machine.check()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(machine, "os_release", lambda: {"ID": "ubuntu", "PRETTY_NAME": "Ubuntu 24.04"})
    with pytest.raises(GpulabError, match=r"This machine is Ubuntu 24\.04"):
        machine.check()


def test_second_up_at_the_same_time_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "check", lambda: None)
    paths.cache().mkdir(parents=True)
    with open(paths.lock(), "w") as other:
        other.write("4711")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(GpulabError, match=r"Another `up` or `down` of the lab is running \(pid 4711\)"):
            lab.down()


def test_status_of_no_lab(monkeypatch, capsys):
    # A subnet of its own: a bridge that stands on the default one, of a lab of somebody else's, would be told.
    monkeypatch.setenv("GPULAB_SUBNET", "192.0.2.0/24")
    lab.show_status()
    assert capsys.readouterr().out == "The rehearsal lab is down.\n"
