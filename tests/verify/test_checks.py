# SPDX-License-Identifier: MIT
"""Every check, broken once: exactly it fails, and what cannot be judged without it is not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.verify.healthy import Doctored, healthy, lab_file, ps_entry, verify

#: Check id -> the place in the observations, what stands there instead, and the checks that are then not run.
Case = tuple[str, str, Any, set[str]]

NEED_VM = ["running", "cores", "memory", "machine", "gpu", "onboot", "network", "disks", "mapping", "pending"]
VM = {f"vm.{name}" for name in NEED_VM}
GPU = {f"nvidia.gpu.{name}" for name in ["memory", "link", "persistence", "memory_health"]}
OLLAMA = {"containers.gpu.visible", *(f"containers.ollama.{name}" for name in ["api", "loopback", "models", "gpu"])}
SERVICE = OLLAMA | {"containers.ollama.running", "containers.ollama.image", "containers.ollama.storage"}

CASES: list[Case] = [
    ("hypervisor.reachable", "reach", {"error": "pve1: no SSH", "fix": "look"}, set()),
    ("hypervisor.pve_version", "hypervisor.pve_version", "pve-manager/7.4-3/9002ab8a", set()),
    ("hypervisor.pve_version", "hypervisor.pve_version", "", set()),
    ("hypervisor.iommu.on", "hypervisor.iommus", [], set()),
    ("hypervisor.iommu.on", "hypervisor.groups", [], {"hypervisor.iommu.group"}),
    ("hypervisor.cmdline", "hypervisor.cmdline", "BOOT_IMAGE=/boot/vmlinuz-6.14.8-2-pve quiet", set()),
    ("hypervisor.device", "hypervisor.devices", {}, {"hypervisor.vfio.bound", "hypervisor.iommu.group"}),
    ("hypervisor.device", "hypervisor.devices.0000:01:00~0.id", "10de:2531", set()),
    ("hypervisor.device", "hypervisor.devices.0000:01:00~1.id", "10de:1ad8", set()),
    ("hypervisor.vfio.bound", "hypervisor.devices.0000:01:00~0.driver", "nouveau", set()),
    ("hypervisor.vfio.bound", "hypervisor.devices.0000:01:00~1.driver", None, set()),
    ("hypervisor.iommu.group", "hypervisor.devices.0000:02:00~0.group", "14", set()),
    ("hypervisor.iommu.group", "hypervisor.devices.0000:01:00~1.group", "15", set()),
    ("hypervisor.modprobe", "hypervisor.modprobe.vfio_ids", ["10de:24b0"], set()),
    ("hypervisor.blacklist", "hypervisor.modprobe.blacklist", ["nvidia", "nvidiafb"], set()),
    ("hypervisor.initramfs.current", "hypervisor.initramfs.vfio_ids", [], set()),
    ("hypervisor.initramfs.current", "hypervisor.initramfs", {"path": "/boot/initrd.img-6", "error": "gone"}, set()),
    ("vm.api.reachable", "api", {"error": "pve1: no connection", "state": "", "version": None}, set()),
    ("vm.exists", "vm", {"exists": False}, VM),
    ("vm.exists", "vm.config.tags", "production", set()),
    ("vm.running", "vm.status", "stopped", set()),
    ("vm.cores", "vm.config.cores", 4, set()),
    ("vm.memory", "vm.config.memory", "current=8192", set()),
    ("vm.machine", "vm.config.machine", "pc-i440fx-9.2", set()),
    ("vm.gpu", "vm.config.hostpci0", "mapping=a4000", set()),
    ("vm.gpu", "vm.config.hostpci1", "0000:03:00.0", set()),
    ("vm.onboot", "vm.config.onboot", 0, set()),
    ("vm.network", "vm.config.net0", "virtio=BC:24:11:00:00:01,bridge=vmbr7", set()),
    ("vm.disks", "vm.config.scsi1", "local-lvm:vm-101-disk-1,size=20G", set()),
    ("vm.disks", "vm.config.scsi0", "", set()),
    ("vm.mapping", "vm.mapping", None, set()),
    ("vm.mapping", "vm.mapping", ["id=10de:24b0,node=pve1,path=0000:41:00"], set()),
    ("vm.mapping", "vm.mapping", ["id=10de:2531,node=pve1,path=0000:01:00"], set()),
    ("vm.mapping", "vm.mapping", ["id=10de:24b0,node=pve2,path=0000:01:00"], set()),
    ("vm.pending", "vm.pending", ["memory"], set()),
    ("system.reachable", "reach", {"error": "gpu01: no SSH", "fix": "look"}, set()),
    ("system.address", "system.addresses", ["192.0.2.77/24"], set()),
    ("system.time", "system.began", 2e9, set()),
    ("system.data_disk", "system.data.separate", False, set()),
    ("system.data_disk", "system.data.source", None, {"system.data_disk.size"}),
    ("system.data_disk.size", "system.data.size_bytes", 2**30, set()),
    ("system.data_disk.fstab", "system.data.fstab", None, set()),
    ("system.data_disk.fstab", "system.data.fstab", "/dev/sdb", set()),
    ("system.data_disk.fstab", "system.data.fstab", "UUID=9999", set()),
    ("system.packages", "system.packages", {}, set()),
    ("nvidia.driver.loaded", "nvidia.loaded", None, {"nvidia.gpu.visible"}),
    ("nvidia.driver.versions", "nvidia.on_disk", "580.105.08", set()),
    ("nvidia.driver.versions", "nvidia.on_disk", None, set()),
    ("nvidia.driver.versions", "nvidia.loaded", "580.105.08", set()),
    ("nvidia.driver.pin", "nvidia.policy.nvidia-driver-cuda.candidate", "590.44.01-1", set()),
    ("nvidia.driver.pin", "nvidia.policy.nvidia-driver-cuda.priorities", {"580.105.08-1": 500}, set()),
    ("nvidia.driver.pin", "nvidia.policy.nvidia-driver-cuda.candidate", None, set()),
    ("nvidia.toolkit.version", "nvidia.policy.libnvidia-container1.installed", "1.17.4-1", set()),
    ("nvidia.toolkit.version", "nvidia.policy.nvidia-container-toolkit.installed", None, set()),
    ("nvidia.repository.signed", "nvidia.sources", {"https://nvidia.github.io/libnvidia-container": []}, set()),
    ("nvidia.gpu.visible", "nvidia.nvml", {"error": "GPU is lost", "gpus": []}, GPU),
    ("nvidia.gpu.visible", "nvidia.nvml.gpus", [], GPU),
    ("nvidia.gpu.memory", "nvidia.nvml.gpus.0.memory_mib", 8188, set()),
    ("nvidia.gpu.link", "nvidia.nvml.gpus.0.link_width", 8, set()),
    ("nvidia.gpu.link", "nvidia.nvml.gpus.0.link_width", None, set()),
    ("nvidia.gpu.persistence", "nvidia.nvml.gpus.0.persistence", 0, set()),
    ("nvidia.gpu.memory_health", "nvidia.nvml.gpus.0.remapped", [1, 1, 0], set()),
    ("nvidia.gpu.xid", "nvidia.xids", [31, 79], set()),
    (
        "containers.engine.active",
        "containers.engine",
        {"active": "failed", "version": None},
        SERVICE | {"containers.cdi"},
    ),
    ("containers.cdi", "containers.cdi", ["vendor.example/gpu=0"], set()),
    ("containers.cdi", "containers.engine.cdi_folders", [], set()),
    ("containers.ollama.running", "containers.service.running", False, OLLAMA),
    ("containers.ollama.running", "containers.service.health", "unhealthy", set()),
    ("containers.ollama.image", "containers.service.digests", ["ollama/ollama@sha256:" + 64 * "b"], set()),
    ("containers.gpu.visible", "containers.service.gpus", [], set()),
    (
        "containers.ollama.api",
        "containers.service.version",
        {"error": "Connection refused"},
        {"containers.ollama.gpu"},
    ),
    ("containers.ollama.loopback", "ollama_port.open", True, set()),
    ("containers.ollama.loopback", "containers.service.listens", ["0.0.0.0", "127.0.0.1"], set()),
    ("containers.ollama.models", "containers.service.tags", {"json": {"models": []}}, set()),
    (
        "containers.ollama.storage",
        "containers.service.models_folder",
        {"inside": "/root/.ollama/models", "outside": "/var/lib/docker/volumes/o", "on_data_disk": False},
        set(),
    ),
    ("containers.ollama.gpu", "ollama_load.ps", {"json": {"models": [ps_entry(0)]}}, set()),
    ("containers.ollama.gpu", "ollama_load.ps", {"json": {"models": []}}, set()),
    ("containers.ollama.gpu", "ollama_load.load", {"error": "HTTP 500: out of memory"}, set()),
]


def doctored(place: str, value: Any) -> dict[str, Any]:
    """Healthy observations with one value replaced; `place` is a dotted path in which `~` stands for a dot."""
    observations = healthy()
    here: Any = observations
    *parents, last = [part.replace("~", ".") for part in place.split(".")]
    for part in parents:
        here = here[int(part) if isinstance(here, list) else part]
    here[last] = value
    return observations


@pytest.mark.parametrize(("id_", "place", "value", "blocked"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_exactly_the_broken_promise_fails(tmp_path: Path, id_: str, place: str, value: Any, blocked: set[str]) -> None:
    node_only = id_.startswith("hypervisor.")
    limit = [] if place != "reach" else ["--limit", "pve1" if node_only else "gpu01"]

    run = verify(lab_file(tmp_path), *limit, plugin=Doctored(doctored(place, value)))

    assert run.ids("fail", "inconclusive") == {id_}
    assert run.ids("not run") == blocked
    result = run.result(id_)
    assert result["host"] in result["message"] or result["verdict"] == "inconclusive"
    assert (result["fix"] and "{" not in result["fix"]) or result["verdict"] == "inconclusive"


def test_every_check_is_broken_by_a_case(tmp_path: Path) -> None:
    run = verify(lab_file(tmp_path), plugin=Doctored(healthy()))

    # The declared version is broken below, since healthy() declares none.
    assert run.ids("pass") - {"nvidia.driver.branch"} == {case[0] for case in CASES}
    assert run.status == 0


def test_driver_of_another_branch_fails_one_check(tmp_path: Path) -> None:
    observations = healthy()
    nvidia = observations["nvidia"]
    nvidia["loaded"] = nvidia["on_disk"] = "590.44.01"
    nvidia["policy"]["nvidia-driver-cuda"]["installed"] = "590.44.01-1"

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.ids("fail") == {"nvidia.driver.branch"}
    assert "driver 590.44.01, expected branch 580" in run.result("nvidia.driver.branch")["message"]


def test_older_version_than_declared_fails(tmp_path: Path) -> None:
    guest = {"nvidia": {"version": "580.105.08"}}

    run = verify(lab_file(tmp_path, guest=guest), plugin=Doctored(healthy()))

    assert run.ids("fail") == {"nvidia.driver.branch"}
    assert "expected 580.105.08" in run.result("nvidia.driver.branch")["message"]


@pytest.mark.parametrize(("key", "value"), [("ecc_uncorrected", 3), ("memory_mib", 16376)])
def test_card_with_ecc(tmp_path: Path, key: str, value: int) -> None:
    observations = healthy()
    observations["nvidia"]["nvml"]["gpus"][0] |= {"ecc": 1, "ecc_uncorrected": 0, "memory_mib": 15352, key: value}

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.ids("fail") == ({"nvidia.gpu.memory_health"} if key == "ecc_uncorrected" else set())


def test_slow_connection_cannot_tell_the_time(tmp_path: Path) -> None:
    observations = doctored("system.received", healthy()["system"]["sent"] + 9)

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.ids("inconclusive") == {"system.time"}
    assert run.status == 1


def test_guest_without_gpu_has_no_gpu_checks(tmp_path: Path) -> None:
    observations = doctored("vm.mapping", None)
    del observations["vm"]["config"]["hostpci0"]

    run = verify(lab_file(tmp_path, guest={"gpu": None, "services": {}}), plugin=Doctored(observations))

    assert run.status == 0
    assert not [id_ for id_ in run.ids("pass") if id_.startswith(("nvidia.", "containers."))]


def test_no_declared_model_is_not_run(tmp_path: Path) -> None:
    guest = {"services": {"ollama": {"image": healthy()["containers"]["service"]["digests"][0], "models": []}}}

    run = verify(lab_file(tmp_path, guest=guest), plugin=Doctored(healthy()))

    assert run.result("containers.ollama.gpu")["message"] == "no model declared"
    assert run.status == 2


def test_declared_options_are_not_asked_for_when_switched_off(tmp_path: Path) -> None:
    node = {"passthrough": {"devices": [{"address": "0000:01:00", "allow_shared_group": True}], "iommu_pt": False}}
    observations = doctored("hypervisor.cmdline", "quiet")
    observations["hypervisor"]["devices"]["0000:02:00.0"]["group"] = "14"

    assert verify(lab_file(tmp_path, node=node), plugin=Doctored(observations)).status == 0


def test_check_that_breaks_fails_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observations = healthy()
    del observations["system"]["addresses"]

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.ids("fail") == {"system.address"}
    assert "the check itself broke: KeyError: 'addresses'" in run.result("system.address")["message"]
    assert "Traceback" not in capsys.readouterr().out
