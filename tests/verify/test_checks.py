# SPDX-License-Identifier: MIT
"""Every check, broken once: exactly it fails, and what cannot be judged without it is not run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inventory.packages import DEBIAN_13
from tests.unit.benchmark_reports import steady
from tests.verify.healthy import (
    FIGURES,
    GUEST,
    IDS,
    PASSTHROUGH,
    READ_AS,
    TIER_1,
    WORDS,
    Doctored,
    Judged,
    Series,
    computing,
    disturbed,
    function,
    healthy,
    lab_file,
    let_in,
    profile,
    ps_entry,
    specification,
    stored,
    tags,
    told,
    unmeasured,
    verify,
)

#: Check id -> the place in the observations, what stands there instead, and the checks that are then not run.
Case = tuple[str, str, Any, set[str]]

BOOTED = "BOOT_IMAGE=/boot/vmlinuz-6.14.8-2-pve root=/dev/sda1 ro "
PLACED = {f"hypervisor.{name}" for name in ["vfio.bound", "iommu.group", "reset", "next_boot.initramfs"]}
UNREADABLE = {"path": "/boot/initrd.img-6", "error": "gone", "missing": False}
INITRAMFS = "hypervisor.next_boot.initramfs"
NEED_VM = [
    *("running", "cores", "memory", "machine", "gpu", "onboot", "network", "disks", "mapping", "pending"),
    *("cloudinit", "cpu_type", "numa", "pinning", "startup", "protection", "labels"),
    *("hardware", "agent", "pinning.cpus", "pinning.pages", "disks.options", "disks.storage"),
]
VM = {f"vm.{name}" for name in NEED_VM}
MPS = {f"nvidia.mps.{name}" for name in ["limits", "server", "closed"]}
SILENT = MPS | {"nvidia.gpu.client"}
NEED_GPU = [
    *("memory", "client", "link", "link.generation", "replay", "throttle", "temperature", "thermal", "settings"),
    *("power_limit", "clocks", "ecc", "compute_mode", "accounting", "persistence", "memory_health"),
]
GPU = MPS | {"nvidia.mps.daemon", "nvidia.mps.uid", "nvidia.gpu.xid", *(f"nvidia.gpu.{name}" for name in NEED_GPU)}
#: What is read of the card's users.
SHARES = {*(f"{share}.budget" for share in ("ollama", "milvus", "tenants.astro")), "card.foreign"}
#: Checks of containers that have nothing to say on a guest that sees no GPU itself.
UNSEEN = {
    *("containers.cdi", "containers.cdi.fresh", "containers.gpu.daemon_reload", "containers.ollama.gpu"),
    "containers.healing",
    "containers.pytorch.cuda",
    "containers.milvus.gpu",
    *(f"containers.{service}.{name}" for service in ("ollama", "milvus") for name in ["running", "gpu_visible"]),
    *(f"containers.{share}" for share in SHARES),
}
#: What only a job can tell.
SEEN_BY_JOBS = {f"containers.pytorch.{name}" for name in ("environment", "cuda", "limits", "rights")}
WORK = {f"nvidia.gpu.{name}" for name in ["link", "link.generation", "throttle", "clocks"]}
UNITS = "nvidia.units"
#: What is promised of every service while it runs, and in any case.
WHILE = ["gpu_visible", "loopback", "hardening"]
ALWAYS = ["running", "image", "storage"]
#: What Ollama has in memory.
LOADED = ("context", "memory")
OF_LOADED = {f"containers.ollama.{name}" for name in LOADED}
#: One of each kind: its own, of the budget, of the way of sharing.
SETTINGS = ("OLLAMA_CONTEXT_LENGTH", "OLLAMA_NO_CLOUD", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "CUDA_MPS_PIPE_DIRECTORY")
OLLAMA = {f"containers.ollama.{name}" for name in [*WHILE, "api", "models", "gpu", *LOADED, "settings"]}
#: What Milvus has to answer for.
OF_MILVUS = {
    f"containers.milvus.{name}"
    for name in ("authorization", "tenants", "isolation", "collections", "indexes", "gpu", "answers")
}
#: What a tenant that does not get in cannot tell.
OF_TENANT = {f"containers.milvus.{name}" for name in ("isolation", "collections", "indexes", "gpu", "answers")}
OF_COLLECTION = {"containers.milvus.indexes", "containers.milvus.answers"}
MILVUS = {"containers.milvus.healthy", *OF_MILVUS, *(f"containers.milvus.{name}" for name in WHILE)}
ENGINE = {
    "containers.cdi",
    "containers.engine.version",
    "containers.gpu.daemon_reload",
    "containers.gpu.engine_restart",
    "containers.pytorch.image",
    "containers.pytorch.job",
}
SERVICE = {
    *OLLAMA,
    *MILVUS,
    *(f"containers.{service}.{name}" for service in ("ollama", "milvus") for name in ALWAYS),
    *(f"containers.{share}" for share in SHARES),
}

THE_FIRST = "containers.data.containers.0"
HERE = {"source": "/srv/data/web", "written": True, "on_data_disk": True}
LOST = {"status": 255, "output": "Failed to initialize NVML: Unknown Error"}
ELSEWHERE = {"source": "/srv/web", "written": True, "on_data_disk": False}

SERVICES = "containers.services"
BY_OLLAMA = computing(900, "ollama", 5000, f"/system.slice/docker-{IDS['ollama']}.scope")
BY_MILVUS = computing(901, "milvus", 800, f"/system.slice/docker-{IDS['milvus']}.scope")
WIDE = [{"address": "0.0.0.0", "port": port, "program": "docker-proxy"} for port in (11434, 19530, 9091)]
#: Name of a check of every service, the place below the service's observation, and what stands there instead.
EACH_SERVICE: list[tuple[str, str, Any]] = [
    ("image", "digests", ["ollama/ollama@sha256:" + 64 * "b"]),
    ("gpu_visible", "gpus", []),
    ("storage", "storage", {"inside": "/models", "outside": "/var/lib/docker/volumes/o", "on_data_disk": False}),
    ("storage", "storage", {"inside": "/models", "outside": None, "on_data_disk": False}),
    ("loopback", "published", ["0.0.0.0:11434"]),
    ("loopback", "listens", WIDE),
    ("loopback", "listens", []),
    ("hardening", "privileges.privileged", True),
    ("hardening", "privileges.read_only", False),
    ("hardening", "privileges.capabilities", 0x400),
    ("hardening", "privileges.no_new_privileges", False),
    ("hardening", "privileges.unconfined", True),
    ("hardening", "privileges.uid", 0),
    ("hardening", "privileges.ipc", "own"),
    ("hardening", "privileges.networks", ["bridge", "gpulab-ollama"]),
]
STRANGERS = "access.services.ollama.answers.strangers"
TENANTS = "access.services.ollama.answers.tenants"
SPECTRA = "milvus.collections.astro~spectra"
TOKENS = {f"containers.ollama.{name}" for name in ["token.required", "token.accepted", "managing"]}
#: All that gpubench gives a figure of.
FIGURED = {"benchmarks.gpu.memory.pattern", *(f"benchmarks.gpu.{name}" for name in FIGURES)}
DOOR = TOKENS | {"containers.ollama.tls", "containers.milvus.tls"}

CASES: list[Case] = [
    ("hypervisor.reachable", "reach", {"error": "pve1: no SSH", "fix": "look"}, set()),
    ("hypervisor.pve_version", "hypervisor.pve_version", "pve-manager/7.4-3/9002ab8a", set()),
    ("hypervisor.pve_version", "hypervisor.pve_version", "", set()),
    ("hypervisor.iommu.on", "hypervisor.iommus", [], set()),
    ("hypervisor.iommu.on", "hypervisor.groups", {}, {"hypervisor.iommu.group"}),
    ("hypervisor.cmdline", "hypervisor.cmdline", BOOTED + WORDS.replace("iommu=pt ", ""), set()),
    ("hypervisor.cmdline", "hypervisor.cmdline", BOOTED + WORDS.replace("pcie_acs_override=downstream ", ""), set()),
    (
        "hypervisor.cmdline",
        "hypervisor.cmdline",
        BOOTED + WORDS.replace("initcall_blacklist=sysfb_init,simpledrm_init ", ""),
        set(),
    ),
    (
        "hypervisor.cmdline",
        "hypervisor.cmdline",
        BOOTED + WORDS.replace("hugepagesz=1G ", "") + " hugepagesz=1G",
        set(),
    ),
    ("hypervisor.cmdline", "hypervisor.groups.15", "DMA-FQ", set()),
    ("hypervisor.kernel", "hypervisor.kernel", "6.8.12-1-pve", set()),
    ("hypervisor.device", "hypervisor.devices", {}, PLACED),
    ("hypervisor.device", "hypervisor.devices.0000:01:00~0.id", "10de:2531", {INITRAMFS}),
    ("hypervisor.device", "hypervisor.devices.0000:01:00~1.id", "10de:1ad8", {INITRAMFS}),
    ("hypervisor.vfio.bound", "hypervisor.devices.0000:01:00~0.driver", "nouveau", set()),
    ("hypervisor.vfio.bound", "hypervisor.devices.0000:01:00~1.driver", None, set()),
    ("hypervisor.iommu.group", "hypervisor.devices.0000:02:00~0.group", "14", set()),
    ("hypervisor.iommu.group", "hypervisor.devices.0000:01:00~1.group", "15", set()),
    ("hypervisor.reset", "hypervisor.devices.0000:01:00~0.reset_methods", ["bus"], set()),
    ("hypervisor.reset", "hypervisor.devices.0000:01:00~0.reset_methods", None, set()),
    ("hypervisor.options", "hypervisor.parameters.vfio_pci~disable_idle_d3", "N", set()),
    ("hypervisor.options", "hypervisor.parameters.vfio_iommu_type1~allow_unsafe_interrupts", None, set()),
    ("hypervisor.blacklist", "hypervisor.modprobe.blacklist", ["nouveau"], set()),
    ("hypervisor.blacklist", "hypervisor.modules", ["igc", "snd_hda_intel"], set()),
    ("hypervisor.hugepages", "hypervisor.hugepages.1048576", 15, set()),
    ("hypervisor.hugepages", "hypervisor.hugepages", {}, set()),
    ("hypervisor.next_boot.kernel", "hypervisor.next_boot.kernel", "6.17.2-1-pve", set()),
    ("hypervisor.next_boot.kernel", "hypervisor.next_boot.kernel", None, {INITRAMFS}),
    ("hypervisor.next_boot.kernel", "hypervisor.next_boot.pinned", "6.17.2-1-pve", set()),
    ("hypervisor.next_boot.kernel", "hypervisor.next_boot.installed", False, set()),
    ("hypervisor.next_boot.kernel", "hypervisor.next_boot.vfio", None, set()),
    ("hypervisor.next_boot.cmdline", "hypervisor.next_boot.cmdline", "root=/dev/sda1 ro quiet", set()),
    (
        "hypervisor.next_boot.cmdline",
        "hypervisor.next_boot.cmdline",
        f"root=/dev/sda1 ro {WORDS} gpulab_vfio=off",
        set(),
    ),
    (INITRAMFS, "hypervisor.next_boot.initramfs", UNREADABLE, set()),
    (INITRAMFS, "hypervisor.next_boot.initramfs", {**UNREADABLE, "missing": True}, set()),
    (INITRAMFS, "hypervisor.next_boot.initramfs.vfio", False, set()),
    (INITRAMFS, "hypervisor.next_boot.initramfs.claims", {"0000:01:00.0": "10de:24b0"}, set()),
    (INITRAMFS, "hypervisor.next_boot.initramfs.claims.0000:01:00~1", "10de:1ad8", set()),
    (INITRAMFS, "hypervisor.next_boot.initramfs.options", {}, set()),
    (INITRAMFS, "hypervisor.next_boot.initramfs.blacklist", [], set()),
    ("hypervisor.reboot_pending", "hypervisor.next_boot.cmdline", f"root=/dev/sda1 ro {WORDS} mitigations=off", set()),
    ("hypervisor.reboot_pending", "hypervisor.next_boot.cmdline", f"root=/dev/sda1 {WORDS}", set()),
    (
        "vm.api.reachable",
        "api",
        {"error": "pve1: no connection", "state": "down", "version": None, "vms": []},
        {"vm.undeclared"},
    ),
    (
        "vm.undeclared",
        "api.vms",
        [{"id": 902, "name": "gpu01-keeper", "tags": "gpulab;gpulab-keeper"}],
        set(),
    ),
    ("vm.exists", "vm", {"exists": False}, VM),
    ("vm.exists", "vm.config.tags", "gpu", set()),
    ("vm.running", "vm.status", "stopped", {"vm.agent", "vm.pinning.cpus", "vm.pinning.pages"}),
    ("vm.hardware", "vm.config.bios", "seabios", set()),
    ("vm.hardware", "vm.config.balloon", 8192, set()),
    ("vm.hardware", "vm.config.scsihw", "lsi", set()),
    ("vm.hardware", "vm.config.boot", "order=net0", set()),
    ("vm.agent", "vm.agent", "500 QEMU guest agent is not running", set()),
    ("vm.agent", "vm.config.agent", "enabled=0", set()),
    ("vm.cores", "vm.config.cores", 4, set()),
    ("vm.memory", "vm.config.memory", "current=8192", set()),
    ("vm.machine", "vm.config.machine", "pc-i440fx-9.2", set()),
    ("vm.gpu", "vm.config.hostpci0", "mapping=a4000", set()),
    ("vm.gpu", "vm.config.hostpci1", "0000:03:00.0", set()),
    ("vm.onboot", "vm.config.onboot", 0, set()),
    ("vm.machine", "vm.config.machine", "pc-q35-9.2", set()),
    ("vm.network", "vm.config.net0", "virtio=BC:24:11:00:00:01,bridge=vmbr7", set()),
    ("vm.network", "vm.config.net0", "virtio=BC:24:11:00:00:01,bridge=vmbr0,tag=4", set()),
    ("vm.network", "vm.config.net1", "virtio=BC:24:11:00:00:02,bridge=vmbr1,tag=30", set()),
    ("vm.network", "vm.config.net1", "virtio=BC:24:11:00:00:99,bridge=vmbr1,mtu=9000,tag=30", set()),
    ("vm.network", "vm.config.net2", "virtio=BC:24:11:00:00:03,bridge=vmbr0", set()),
    ("vm.cloudinit", "vm.config.ipconfig0", "ip=192.0.2.101/24", set()),
    ("vm.cloudinit", "vm.config.ipconfig1", "ip=192.0.2.7/24", set()),
    ("vm.cloudinit", "vm.config.nameserver", "192.0.2.54 192.0.2.53", set()),
    ("vm.cloudinit", "vm.config.searchdomain", "example", set()),
    ("vm.cloudinit", "vm.config.ciuser", "root", set()),
    ("vm.cloudinit", "vm.config.ciupgrade", 1, set()),
    ("vm.cpu_type", "vm.config.cpu", "x86-64-v2-AES", set()),
    ("vm.numa", "vm.config.numa", 0, set()),
    ("vm.numa", "vm.config.numa0", "memory=16384,cpus=0-3;6", set()),
    ("vm.numa", "vm.config.numa1", "memory=16384,cpus=4", set()),
    ("vm.pinning", "vm.config.affinity", "0-3", set()),
    ("vm.pinning", "vm.config.hugepages", "2", set()),
    ("vm.pinning.cpus", "process.threads.2.cpus", "0-8", set()),
    ("vm.pinning.cpus", "process.threads.1.cpus", "0-63", set()),
    ("vm.pinning.cpus", "process.threads", [{"name": "kvm", "cpus": "0-7"}], set()),
    ("vm.pinning.cpus", "process.threads", [{"name": "CPU 0/KVM", "cpus": "0-3"}], set()),
    ("vm.pinning.pages", "process.huge_mib", {}, set()),
    ("vm.pinning.pages", "process.huge_mib", {"2048": 16384}, set()),
    ("vm.startup", "vm.config.startup", "2", set()),
    ("vm.protection", "vm.config.protection", 0, set()),
    ("vm.labels", "vm.config.tags", "gpulab;gpu;other", set()),
    ("vm.labels", "vm.config.description", "Another.", set()),
    ("vm.disks", "vm.config.scsi1", "local-lvm:vm-101-disk-1,discard=on,iothread=1,size=20G,ssd=1", set()),
    ("vm.disks.options", "vm.config.scsi0", "local-lvm:vm-101-disk-0,discard=on,size=64G,ssd=1", set()),
    ("vm.disks.options", "vm.config.scsi1", "local-lvm:d,backup=0,discard=on,iothread=1,size=200G,ssd=1", set()),
    ("vm.disks.storage", "vm.config.scsi1", "slow:vm-101-disk-1,discard=on,iothread=1,size=200G,ssd=1", set()),
    ("vm.disks", "vm.config.scsi0", "", set()),
    ("vm.backup.job", "backup.job", None, set()),
    ("vm.backup.job", "backup.job.enabled", 0, set()),
    ("vm.backup.job", "backup.job.schedule", "sat 02:30", set()),
    ("vm.backup.job", "backup.job.storage", "local", set()),
    ("vm.backup.job", "backup.job.mode", "stop", set()),
    ("vm.backup.job", "backup.job.vmid", "1010,102", set()),
    ("vm.backup.job", "backup.job.node", "pve2", set()),
    ("vm.backup.job", "backup.job.prune-backups", {"keep-last": "3"}, set()),
    ("vm.backup.job", "backup.job.prune-backups", "keep-all=1", set()),
    ("vm.backup.age", "backup.backups", [], set()),
    ("vm.backup.age", "backup.backups", [stored(0)], set()),
    ("vm.backup.age", "backup.backups", [stored(time.time(), size=0)], set()),
    ("vm.backup.age", "backup.backups", [stored(time.time(), verification="failed")], set()),
    ("vm.backup.age", "backup.error", "storage 'nas' is not online", set()),
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
    ("system.data_disk.beneath", "system.data.beneath", None, set()),
    ("system.data_disk.beneath", "system.data.beneath", {"entries": ["ollama"], "immutable": True}, set()),
    ("system.data_disk.beneath", "system.data.beneath.immutable", False, set()),
    ("system.data_disk.size", "system.data.size_bytes", 2**30, set()),
    ("system.data_disk.fstab", "system.data.fstab", None, set()),
    ("system.data_disk.fstab", "system.data.fstab", "/dev/sdb", set()),
    ("system.data_disk.fstab", "system.data.fstab", "UUID=9999", set()),
    ("system.packages", "system.packages", {"unattended-upgrades": "2.12"}, set()),
    ("system.security_upgrades", "system.packages", dict.fromkeys(DEBIAN_13.base, "1"), set()),
    ("system.security_upgrades", "system.upgrades.runs", False, set()),
    ("system.security_upgrades", "system.upgrades.reboots", True, set()),
    ("system.security_upgrades", "system.upgrades.timer", "inactive", set()),
    ("nvidia.driver.loaded", "nvidia.loaded", None, {"nvidia.gpu.visible"}),
    ("nvidia.driver.versions", "nvidia.on_disk", "580.105.08", set()),
    ("nvidia.driver.versions", "nvidia.on_disk", None, set()),
    ("nvidia.driver.versions", "nvidia.loaded", "580.105.08", set()),
    ("nvidia.driver.versions", "nvidia.library", "550.163.01", set()),
    ("nvidia.driver.versions", "nvidia.firmware", ["580.105.08"], set()),
    ("nvidia.driver.nouveau", "nvidia.nouveau.loaded", True, set()),
    ("nvidia.driver.nouveau", "nvidia.nouveau.blacklisted", False, set()),
    ("nvidia.driver.next_kernel", "nvidia.next_kernel.module", None, set()),
    ("nvidia.driver.next_kernel", "nvidia.next_kernel.module", "580.82.07", set()),
    ("nvidia.driver.held", "nvidia.held", [*DEBIAN_13.driver, "libcuda1"], set()),
    ("nvidia.driver.unattended", "nvidia.apt.blacklist", [".*nvidia"], set()),
    ("nvidia.driver.unattended", "nvidia.apt.blacklist", ["nvidia", "libcuda"], set()),
    ("nvidia.driver.pin", "nvidia.policy.nvidia-driver-cuda.candidate", "590.44.01-1", set()),
    ("nvidia.driver.pin", "nvidia.policy.nvidia-driver-cuda.priorities", {"580.105.08-1": 500}, set()),
    ("nvidia.driver.pin", "nvidia.policy.nvidia-driver-cuda.candidate", None, set()),
    ("nvidia.toolkit.version", "nvidia.policy.libnvidia-container1.installed", "1.17.4-1", set()),
    ("nvidia.toolkit.version", "nvidia.policy.nvidia-container-toolkit.installed", None, set()),
    ("nvidia.repository.signed", "nvidia.sources", {"https://nvidia.github.io/libnvidia-container": []}, set()),
    ("nvidia.cuda", "nvidia.cuda.13~0", "12.9", set()),
    ("nvidia.cuda", "nvidia.cuda.12~9", "", set()),
    ("nvidia.gpu.visible", "nvidia.nvml", {"error": "GPU is lost", "gpus": []}, GPU | UNSEEN),
    ("nvidia.gpu.visible", "nvidia.nvml.gpus", [], GPU | UNSEEN),
    ("nvidia.gpu.visible", "nvidia.on_bus", [], {"nvidia.gpu.xid"}),
    ("nvidia.gpu.memory", "nvidia.nvml.gpus.0.memory_mib", 8188, set()),
    ("nvidia.gpu.client", "nvidia.nvml.gpus.0.work.error", "cuInit: CUDA_ERROR_NO_DEVICE (100)", WORK),
    ("nvidia.gpu.link", "nvidia.nvml.gpus.0.work.width", 8, set()),
    ("nvidia.gpu.link", "nvidia.nvml.gpus.0.work.width", None, set()),
    ("nvidia.gpu.link.generation", "nvidia.nvml.gpus.0.work.generation", 2, set()),
    ("nvidia.gpu.link.generation", "nvidia.nvml.gpus.0.work.generation", None, set()),
    (
        "nvidia.gpu.link.generation",
        "nvidia.nvml.gpus.0.work",
        {"by": ["ollama"], "error": "", "generation": 1, "width": 16, "clock_mhz": 1545, "use": 0, "reasons": 1},
        set(),
    ),
    (
        "nvidia.gpu.link",
        "nvidia.nvml.gpus.0.work",
        {"by": ["ollama"], "error": "", "generation": 4, "width": 4, "clock_mhz": 1545, "use": 0, "reasons": 1},
        set(),
    ),
    ("nvidia.gpu.replay", "nvidia.nvml.gpus.0.replays", [7, 9], set()),
    ("nvidia.gpu.replay", "nvidia.nvml.gpus.0.replays", [None, None], set()),
    ("nvidia.gpu.throttle", "nvidia.nvml.gpus.0.work.reasons", 0x44, set()),
    ("nvidia.gpu.throttle", "nvidia.nvml.gpus.0.work.reasons", None, set()),
    ("nvidia.gpu.temperature", "nvidia.nvml.gpus.0.temperature_c", 90, set()),
    ("nvidia.gpu.thermal", f"{UNITS}.gpulab-gpu-thermal~service.active", "failed", set()),
    ("nvidia.gpu.thermal", f"{UNITS}.gpulab-gpu-thermal~service.enabled", "disabled", set()),
    ("nvidia.gpu.settings", f"{UNITS}.gpulab-gpu-settings~service.enabled", "", set()),
    ("nvidia.gpu.settings", f"{UNITS}.gpulab-gpu-settings~service.active", "failed", set()),
    ("nvidia.gpu.power_limit", "nvidia.nvml.gpus.0.power_limit_w", 140.0, set()),
    ("nvidia.gpu.power_limit", "nvidia.nvml.gpus.0.power_enforced_w", 100.0, set()),
    ("nvidia.gpu.clocks", "nvidia.nvml.gpus.0.work.clock_mhz", 1800, set()),
    ("nvidia.gpu.clocks", "nvidia.nvml.gpus.0.work.clock_mhz", 800, set()),
    ("nvidia.gpu.ecc", "nvidia.nvml.gpus.0.ecc", 1, set()),
    ("nvidia.gpu.compute_mode", "nvidia.nvml.gpus.0.compute_mode", 0, set()),
    ("nvidia.gpu.accounting", "nvidia.nvml.gpus.0.accounting", 0, set()),
    ("nvidia.gpu.persistence", "nvidia.nvml.gpus.0.persistence", 0, set()),
    ("nvidia.gpu.memory_health", "nvidia.nvml.gpus.0.remapped", [1, 1, 0], set()),
    ("nvidia.gpu.xid", "nvidia.xids", [31, 79], set()),
    ("nvidia.mps.daemon", "nvidia.mps", None, SILENT),
    ("nvidia.mps.daemon", "nvidia.mps.percentage", {"status": None, "says": "nothing within 5 s"}, SILENT),
    ("nvidia.mps.daemon", f"{UNITS}.gpulab-mps~service.enabled", "disabled", set()),
    ("nvidia.mps.limits", "nvidia.mps.percentage.says", "100.0", set()),
    ("nvidia.mps.limits", "nvidia.mps.memory.says", "", set()),
    ("nvidia.mps.limits", "nvidia.mps.memory.says", "16G", set()),
    ("nvidia.mps.server", "nvidia.mps.servers", [], set()),
    ("nvidia.mps.server", "nvidia.mps.servers", [{"pid": 801, "uid": 0}], set()),
    ("nvidia.mps.closed", "nvidia.mps.stranger", {"status": None, "says": "nothing within 5 s"}, set()),
    ("nvidia.mps.closed", "nvidia.mps.stranger", {"status": 0, "says": ""}, set()),
    ("nvidia.mps.tenants", "nvidia.tenants.astro", profile("50", "1", "0=8192M"), set()),
    ("nvidia.mps.tenants", "nvidia.tenants", {"astro": profile("50", "1", "0=6144M")}, set()),
    ("nvidia.mps.tenants", "nvidia.tenants.gone", {}, set()),
    ("nvidia.mps.uid", "nvidia.nvml.gpus.0.processes", [{**BY_OLLAMA, "uid": 1000}, BY_MILVUS], set()),
    (
        "containers.engine.active",
        "containers.engine",
        {"active": "failed", "version": None},
        SERVICE | ENGINE | {f"containers.data_disk.{name}" for name in ["required", "folders", "bound"]},
    ),
    (
        "containers.data_disk.required",
        "containers.data.mounted",
        False,
        {"containers.data_disk.folders", "containers.data_disk.bound"},
    ),
    ("containers.data_disk.folders", f"{THE_FIRST}.folders", [], set()),
    ("containers.data_disk.folders", f"{THE_FIRST}.folders", [ELSEWHERE], set()),
    ("containers.data_disk.folders", f"{THE_FIRST}.folders", [HERE, ELSEWHERE], set()),
    ("containers.data_disk.bound", "containers.data.bound", ["gpulab-containers.service"], set()),
    ("containers.cdi", "containers.cdi", ["vendor.example/gpu=0"], {"containers.gpu.daemon_reload"}),
    ("containers.cdi", "containers.engine.cdi_folders", [], {"containers.gpu.daemon_reload"}),
    ("containers.engine.version", "containers.engine.version", "25.0.5", set()),
    ("containers.engine.version", "containers.engine.version", "26.0.2", set()),
    ("containers.cdi.fresh", "containers.loaded", "580.105.08", set()),
    (
        "containers.cdi.fresh",
        "containers.specifications",
        {"/var/run/cdi/nvidia.yaml": specification(missing=["/dev/nvidia0"])},
        set(),
    ),
    (
        "containers.cdi.fresh",
        "containers.specifications",
        {"/etc/cdi/nvidia.yaml": specification(digest=64 * "d"), "/var/run/cdi/nvidia.yaml": specification()},
        set(),
    ),
    ("containers.gpu.daemon_reload", "daemon_reload.after", LOST, set()),
    ("containers.gpu.daemon_reload", "daemon_reload", disturbed(error="gpu01: no such device", before=None), set()),
    ("containers.gpu.engine_restart", "containers.engine.live_restore", False, set()),
    ("containers.gpu.engine_restart", f"{THE_FIRST}.gpu", "hook", set()),
    ("containers.ollama.running", f"{SERVICES}.ollama.running", False, OLLAMA),
    ("containers.milvus.running", f"{SERVICES}.milvus.running", False, MILVUS),
    ("containers.ollama.running", f"{SERVICES}.ollama.health", "unhealthy", set()),
    ("containers.ollama.budget", "nvidia.nvml.gpus.0.processes", [{**BY_OLLAMA, "memory_mib": 8193}, BY_MILVUS], set()),
    ("containers.ollama.budget", "nvidia.nvml.gpus.0.processes", [{**BY_OLLAMA, "memory_mib": None}, BY_MILVUS], set()),
    (
        "containers.ollama.budget",
        "nvidia.nvml.gpus.0.processes",
        [BY_OLLAMA, {**BY_OLLAMA, "pid": 9}, BY_MILVUS],
        set(),
    ),
    ("containers.milvus.budget", "nvidia.nvml.gpus.0.processes.2.memory_mib", 1025, set()),
    ("containers.tenants.astro.budget", "nvidia.nvml.gpus.0.processes.3.memory_mib", 6145, set()),
    ("containers.card.foreign", "nvidia.nvml.gpus.0.processes.0.name", "python3", set()),
    ("containers.card.foreign", "nvidia.nvml.gpus.0.processes.1.cgroup", f"/docker/{64 * '9'}", set()),
    # A tenant without a share runs no jobs.
    ("containers.card.foreign", "containers.data.containers.2.tenant", "ml", set()),
    ("containers.milvus.gpu", "nvidia.nvml.gpus.0.processes", [BY_OLLAMA], set()),
    *[
        (f"containers.{service}.{name}", f"{SERVICES}.{service}.{place}", value, set())
        for service in ("ollama", "milvus")
        for name, place, value in EACH_SERVICE
    ],
    ("containers.milvus.loopback", "ports.9091", True, set()),
    ("containers.healing", "containers.healing.active", "inactive", set()),
    ("containers.healing", "containers.healing.enabled", "", set()),
    ("containers.healing", "containers.healing.age_s", None, set()),
    ("containers.healing", "containers.healing.age_s", 361.0, set()),
    ("containers.healing", "containers.healing.alarms", {"ollama": "2026-11-29 it does not answer"}, set()),
    ("containers.ollama.hardening", f"{SERVICES}.ollama.limits.memory_mib", 16384, set()),
    (
        "containers.ollama.api",
        f"{SERVICES}.ollama.version",
        {"error": "Connection refused"},
        {"containers.ollama.gpu", *OF_LOADED},
    ),
    ("containers.access.nginx", "access.guest.active", "failed", DOOR),
    ("containers.access.nginx", "access.guest.enabled", "disabled", set()),
    ("containers.access.nginx", "access.guest.refused", "key values mismatch", set()),
    ("containers.ollama.tls", "access.services.ollama.tls.error", "certificate has expired", TOKENS),
    ("containers.ollama.tls", "access.services.ollama.tls.days", 29.5, set()),
    ("containers.ollama.tls", "access.services.ollama.tls.protocol", "TLSv1.1", set()),
    ("containers.milvus.tls", "access.services.milvus.tls.error", "Connection refused", set()),
    ("containers.ollama.token.required", f"{STRANGERS}.nobody", let_in(), set()),
    ("containers.ollama.token.required", f"{STRANGERS}.a stranger", let_in(), set()),
    ("containers.ollama.token.required", f"{STRANGERS}.astro with its secret of milvus", let_in(404), set()),
    ("containers.ollama.token.required", f"{STRANGERS}.nobody", let_in(401, challenge=None), set()),
    ("containers.ollama.token.required", f"{STRANGERS}.nobody", let_in(0, error="timed out"), set()),
    ("containers.ollama.token.accepted", f"{TENANTS}.ml", None, set()),
    ("containers.ollama.token.accepted", f"{TENANTS}.ml", let_in(401), set()),
    ("containers.ollama.token.accepted", f"{TENANTS}.ml", let_in(502), set()),
    ("containers.ollama.managing", "access.services.ollama.answers.managing", let_in(400), set()),
    ("containers.access.ports", "access.open", [{"address": "0.0.0.0", "port": 80, "program": "nginx"}], set()),
    ("containers.access.log", "access.guest.log.lines", [], set()),
    ("containers.access.log", "access.guest.log.lines.0.tenant", "", set()),
    ("containers.access.log", "access.guest.log.lines", [{"request": "r1", "tenant": "astro"}], set()),
    ("containers.access.log", "access.guest.log.broken", 3, set()),
    ("containers.access.log", "access.guest.log.mode", None, set()),
    ("containers.access.log", "access.guest.log.mode", 0o644, set()),
    ("containers.access.secrets", "access.guest.files", {}, set()),
    ("containers.access.secrets", "access.guest.files./etc/nginx/gpulab.mode", 0o755, set()),
    ("containers.access.secrets", "access.guest.files./etc/nginx/gpulab/server~key.mode", 0o644, set()),
    ("containers.access.secrets", "access.guest.files./etc/nginx/gpulab/server~key.uid", 33, set()),
    ("containers.ollama.models", f"{SERVICES}.ollama.tags", {"json": {"models": []}}, {"containers.ollama.gpu"}),
    ("containers.ollama.models", f"{SERVICES}.ollama.tags", {"json": {"models": tags(64 * "0")}}, set()),
    ("containers.ollama.models", f"{SERVICES}.ollama.show own", {"json": {"modelfile": "FROM tiny\n"}}, set()),
    (
        "containers.ollama.models",
        f"{SERVICES}.ollama.show own.json.modelfile",
        f"FROM /models/blobs/sha256-{64 * '1'}\n",
        set(),
    ),
    *[("containers.ollama.settings", f"{SERVICES}.ollama.environment.{name}", "other", set()) for name in SETTINGS],
    ("containers.ollama.settings", f"{SERVICES}.ollama.environment", {}, set()),
    ("containers.ollama.context", "ollama_load.ps.json.models.0.context_length", 32768, set()),
    ("containers.ollama.context", "ollama_load.ps.json.models.0.context_length", 0, set()),
    ("containers.ollama.memory", "ollama_load.ps.json.models.0.size_vram", 8193 * 2**20, set()),
    ("containers.ollama.memory", "ollama_load.ps.json.models", [ps_entry(1), ps_entry(1)], set()),
    ("containers.ollama.gpu", "ollama_load.ps", {"json": {"models": [ps_entry(0)]}}, set()),
    ("containers.ollama.gpu", "ollama_load.ps", {"json": {"models": []}}, {"containers.ollama.context"}),
    ("containers.ollama.gpu", "ollama_load.load", {"error": "HTTP 500: out of memory"}, OF_LOADED),
    ("containers.milvus.healthy", "milvus.health", "component rootcoord state is Abnormal", OF_MILVUS),
    ("containers.milvus.healthy", "milvus.error", "/opt/gpulab/milvus-tools has no driver", OF_MILVUS),
    *[
        ("containers.milvus.authorization", f"milvus.strangers.{who}", told(), set())
        for who in ("nobody", "root with Milvus' first password", "root with a wrong password")
    ],
    ("containers.milvus.authorization", "milvus.strangers.nobody", told("REFUSED", "no such database"), set()),
    ("containers.milvus.authorization", "milvus.unguarded", ["/api/v1/collections"], set()),
    ("containers.milvus.authorization", "milvus.root", told("UNAUTHENTICATED", "auth check failure"), set()),
    ("containers.milvus.tenants", "milvus.tenants.astro.login", told("UNAUTHENTICATED", "auth check"), OF_TENANT),
    (
        "containers.milvus.tenants",
        "milvus.tenants.ml.login",
        told("", "the lab has no such password"),
        {"containers.milvus.isolation"},
    ),
    ("containers.milvus.tenants", "milvus.tenants.ml.own.insert", told("PERMISSION_DENIED"), set()),
    ("containers.milvus.tenants", "milvus.tenants.ml.roles", [], set()),
    ("containers.milvus.tenants", "milvus.tenants.ml.roles", ["admin", "gpulab_ml"], set()),
    ("containers.milvus.isolation", "milvus.tenants.ml.managing.make users", told("REFUSED", "invalid name"), set()),
    ("containers.milvus.isolation", "milvus.foreign.astro in ml.insert", told("REFUSED", "not found"), set()),
    ("containers.milvus.isolation", "milvus.foreign.ml in astro.read spectra", told(), set()),
    ("containers.milvus.collections", f"{SPECTRA}.told", told("REFUSED", "collection not found"), OF_COLLECTION),
    ("containers.milvus.collections", f"{SPECTRA}.dimension", 64, set()),
    ("containers.milvus.indexes", f"{SPECTRA}.index", None, set()),
    # What a server without a GPU can have in its place.
    ("containers.milvus.indexes", f"{SPECTRA}.index", {"index_type": "HNSW", "metric_type": "L2"}, set()),
    ("containers.milvus.indexes", f"{SPECTRA}.index.metric_type", "IP", set()),
    ("containers.milvus.indexes", f"{SPECTRA}.index.graph_degree", "32", set()),
    ("containers.milvus.profiles", "milvus.profiles", None, set()),
    ("containers.milvus.profiles", "milvus.profiles.sky.search", {"itopk_size": 64}, set()),
    ("containers.milvus.profiles", "milvus.profiles.other", {"index_type": "HNSW"}, set()),
    ("containers.milvus.answers", f"{SPECTRA}.search", told("REFUSED", "no", seconds=0.1, found=0), set()),
    ("containers.milvus.answers", f"{SPECTRA}.search.seconds", 10.1, set()),
    ("containers.pytorch.image", "pytorch.digests", [], set()),
    ("containers.pytorch.job", "pytorch.job", {"status": 125, "saw": None, "said": "no such device"}, SEEN_BY_JOBS),
    ("containers.pytorch.job", "pytorch.job.status", 1, set()),
    ("containers.pytorch.environment", "pytorch.job.saw.versions", {"torch": "2.13.0", "einops": "0.8.1"}, set()),
    ("containers.pytorch.environment", "pytorch.job.saw.own", ["einops", "stars"], set()),
    ("containers.pytorch.environment", "pytorch.job.saw.changed", ["einops/einops.py"], set()),
    ("containers.pytorch.cuda", "pytorch.job.saw.devices", 0, set()),
    ("containers.pytorch.cuda", "pytorch.job.saw.computed", "CUDA error: out of memory", set()),
    ("containers.pytorch.limits", "pytorch.job.saw.environment.CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", None, set()),
    ("containers.pytorch.limits", "pytorch.job.saw.environment.GPULAB_TORCH_MEMORY_FRACTION", "1.000000", set()),
    ("containers.pytorch.limits", "pytorch.job.saw.memory_max", "1073741824", set()),
    ("containers.pytorch.rights", "pytorch.job.saw.uid", 0, set()),
    ("containers.pytorch.rights", "pytorch.job.saw.capabilities", 1, set()),
    ("containers.pytorch.rights", "pytorch.job.saw.no_new_privileges", False, set()),
    ("containers.pytorch.rights", "pytorch.job.saw.root_writable", True, set()),
    ("benchmarks.gpu.answers", "gpubench", unmeasured("failed", "the GPU has fallen off the bus"), FIGURED),
    ("benchmarks.gpu.memory.pattern", "gpubench.metrics.memory~pattern.samples", [0.0, 0.0, 3.0, 0.0], set()),
    ("benchmarks.gpu.memory.pattern", "gpubench.metrics.memory~pattern.wrong", 3, set()),
    *[
        (f"benchmarks.gpu.{name}", f"gpubench.metrics.{name.replace('.', '~')}.{key}", value, set())
        for name, level in FIGURES.items()
        for key, value in [
            ("wrong", 1),
            ("samples", steady(level * (1.2 if name == "launch.latency" else 0.6 if name == "memory.triad" else 0.4))),
        ]
    ],
    # Of others it is not known how good they are.
    ("benchmarks.gpu.h2d.pinned", "gpubench.metrics.h2d~pinned.samples", [20.0, 25.0] * 6, set()),
    ("benchmarks.gpu.fp32.fma", "gpubench.metrics.fp32~fma.checked", False, set()),
    ("benchmarks.gpu.memory.copy", "gpubench.metrics.memory~copy.samples", steady(520.0), set()),
    *[
        (f"benchmarks.{name}", f"{READ_AS[tool]}.metrics.{name.replace('.', '~')}.{key}", value, set())
        for tool, levels in TIER_1.items()
        for name, level in levels.items()
        for key, value in [("wrong", 1), ("samples", steady(level * 0.4))]
    ],
    ("benchmarks.mps.limit", "mpsbench.metrics.mps~limit.samples", [0.0, 1.0, 0.0, 0.0, 0.0, 0.0], set()),
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


def together(case: Case) -> tuple[str, tuple[str, ...]]:
    """The subject that a case changes and the hosts to verify: cases that have both in common are one series."""
    subject = case[1].partition(".")[0]
    if subject != "reach":
        return subject, ()
    # Of what is not reached nothing else is checked, and the same goes for the other host here.
    return subject, ("--limit", "pve1" if case[0].startswith("hypervisor.") else "gpu01")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Judged]:
    """What the checks came to in a case. A series is run when it is first asked for."""
    known: dict[int, Judged] = {}

    def of(case: Case) -> Judged:
        if id(case) not in known:
            cases = [other for other in CASES if together(other) == together(case)]
            subject, limit = together(case)
            series = Series(subject, [doctored(place, value) for _, place, value, _ in cases])
            verify(lab_file(tmp_path_factory.mktemp(subject)), *limit, plugin=series)
            known.update(zip(map(id, cases), series.judged, strict=True))
        return known[id(case)]

    return of


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_exactly_the_broken_promise_fails(judged: Callable[[Case], Judged], case: Case) -> None:
    id_, _, _, blocked = case

    run = judged(case)

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


OFF_THE_BUS = "NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus."


@pytest.mark.parametrize(
    ("fallen", "xids", "said", "fix"),
    [
        (None, [31], "was the VM started without it", "deploy.py"),
        (OFF_THE_BUS, [79], OFF_THE_BUS, "stop and start"),
        (None, [119], "the kernel log has Xid 119", "stop and start"),
    ],
)
def test_guest_whose_gpu_is_missing_fails_in_one_line(
    tmp_path: Path, fallen: str | None, xids: list[int], said: str, fix: str
) -> None:
    """As after a start of the VM without its card: the driver refuses to load, and no daemon of its units starts."""
    observations = healthy()
    observations["nvidia"] |= {
        "on_bus": [],
        "loaded": None,
        "fallen": fallen,
        "xids": xids,
        "nvml": {"error": "Driver Not Loaded", "gpus": []},
        "mps": {**observations["nvidia"]["mps"], "percentage": {"status": 1, "says": "Cannot find"}, "servers": []},
    }
    for unit in observations["nvidia"]["units"].values():
        unit["active"] = "inactive"

    # Docker starts nothing that was given the card, and says so of a container with it.
    observations["containers"]["cdi"] = []
    for service in observations["containers"]["services"].values():
        service |= {"running": False, "status": "exited", "gpus": []}

    run = verify(lab_file(tmp_path), "--limit", "gpu01", plugin=Doctored(observations))

    assert run.ids("fail") == {"nvidia.gpu.visible"}
    assert run.ids("not run") == GPU | UNSEEN | OLLAMA | MILVUS | {"nvidia.driver.loaded"}
    result = run.result("nvidia.gpu.visible")
    assert "\n" not in result["message"] and said in result["message"]
    assert fix in result["fix"]


def test_lost_gpu_says_what_the_kernel_said(tmp_path: Path) -> None:
    observations = doctored("nvidia.nvml", {"error": "GPU is lost", "gpus": []})
    observations["nvidia"] |= {"fallen": OFF_THE_BUS, "xids": [79]}

    run = verify(lab_file(tmp_path), "--limit", "gpu01", plugin=Doctored(observations))

    assert run.ids("fail") == {"nvidia.gpu.visible"}
    assert OFF_THE_BUS in run.result("nvidia.gpu.visible")["message"]


def test_server_that_a_simulated_card_cannot_have_is_not_run(tmp_path: Path) -> None:
    observations = doctored("nvidia.mps.servers", [])
    observations["nvidia"]["simulated"] = ["the kernel module"]
    guest = {"simulated": "rehearsal", "expected_not_run": ["nvidia.mps.server"]}

    run = verify(lab_file(tmp_path, guest=guest), plugin=Doctored(observations))

    assert (run.status, run.ids("not run"), run.ids("fail")) == (0, {"nvidia.mps.server"}, set())


def shared(sharing: str) -> dict[str, Any]:
    """The healthy lab of another way of sharing."""
    observations = healthy()
    nvidia = observations["nvidia"]
    nvidia |= {"mps": None, "tenants": {}}
    nvidia["units"]["gpulab-mps.service"] = {"active": "", "enabled": ""}
    nvidia["nvml"]["gpus"][0] |= {"compute_mode": 0 if sharing == "time-slice" else 3, "processes": [BY_MILVUS]}
    for service in observations["containers"]["services"].values():
        service["privileges"] |= {"uid": 0, "ipc": "own"}
    observations["pytorch"]["job"]["saw"]["environment"]["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = None
    return observations


@pytest.mark.parametrize("sharing", ["time-slice", "exclusive"])
def test_other_ways_of_sharing_have_no_daemon(tmp_path: Path, sharing: str) -> None:
    lab = lab_file(tmp_path, guest={"nvidia": {**GUEST["nvidia"], "sharing": sharing}})
    observations = shared(sharing)

    run = verify(lab, plugin=Doctored(observations))

    assert (run.status, run.ids("fail")) == (0, set())
    assert {id_ for id_ in run.ids("pass", "not run") if id_.startswith("nvidia.mps")} == {"nvidia.mps.off"}

    observations["nvidia"]["mps"] = healthy()["nvidia"]["mps"]
    assert verify(lab, plugin=Doctored(observations)).ids("fail") == {"nvidia.mps.off"}
    observations["nvidia"] |= {"mps": None, "units": healthy()["nvidia"]["units"]}
    assert verify(lab, plugin=Doctored(observations)).ids("fail") == {"nvidia.mps.off"}


def test_undeclared_settings_are_the_cards_own(tmp_path: Path) -> None:
    observations = healthy()
    nvidia = observations["nvidia"]
    gpu = nvidia["nvml"]["gpus"][0]
    gpu |= {"power_limit_w": 140.0, "power_enforced_w": 140.0, "ecc": 1, "temperature_c": 95, "processes": []}
    gpu["work"]["clock_mhz"] = 1800
    nvidia["mps"] |= {"percentage": {"status": 0, "says": "100.0"}, "memory": {"status": 0, "says": ""}}
    nvidia |= {"tenants": {}, "cuda": {}}
    nvidia["units"]["gpulab-gpu-thermal.service"] = {"active": "", "enabled": ""}
    # Without tenants nobody runs jobs or has a database.
    services = {"ollama": GUEST["services"]["ollama"], "milvus": {**GUEST["services"]["milvus"], "collections": []}}
    lab = lab_file(tmp_path, guest={"nvidia": {"thermal": None}, "tenants": [], "services": services})

    run = verify(lab, plugin=Doctored(observations))

    # Nobody watches it: the card's own limit counts.
    assert run.ids("fail") == {"nvidia.gpu.temperature"}
    assert run.result("nvidia.gpu.clocks")["message"] == "none declared"


def test_card_that_is_slowed_down_may_be_below_its_locked_clock(tmp_path: Path) -> None:
    observations = healthy()
    observations["nvidia"]["nvml"]["gpus"][0]["work"] |= {"clock_mhz": 800, "reasons": 0x40}

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.ids("fail") == {"nvidia.gpu.throttle"}


def test_no_unattended_upgrades_need_no_list(tmp_path: Path) -> None:
    observations = doctored("nvidia.apt.blacklist", [])
    del observations["nvidia"]["installed"]["unattended-upgrades"]

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.result("nvidia.driver.unattended")["message"] == "unattended-upgrades is not installed"


def test_driver_of_another_branch_fails_one_check(tmp_path: Path) -> None:
    observations = healthy()
    nvidia = observations["nvidia"]
    nvidia["loaded"] = nvidia["on_disk"] = nvidia["library"] = nvidia["next_kernel"]["module"] = "590.44.01"
    nvidia["firmware"] = ["590.44.01"]
    nvidia["policy"]["nvidia-driver-cuda"]["installed"] = "590.44.01-1"

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.ids("fail") == {"nvidia.driver.branch"}
    assert "driver 590.44.01, expected branch 580" in run.result("nvidia.driver.branch")["message"]


def test_older_version_than_declared_fails(tmp_path: Path) -> None:
    guest = {"nvidia": {**GUEST["nvidia"], "version": "580.105.08"}}

    run = verify(lab_file(tmp_path, guest=guest), plugin=Doctored(healthy()))

    assert run.ids("fail") == {"nvidia.driver.branch"}
    assert "expected 580.105.08" in run.result("nvidia.driver.branch")["message"]


@pytest.mark.parametrize(("key", "value"), [("ecc_uncorrected", 3), ("memory_mib", 16376)])
def test_card_with_ecc(tmp_path: Path, key: str, value: int) -> None:
    observations = healthy()
    observations["nvidia"]["nvml"]["gpus"][0] |= {"ecc": 1, "ecc_uncorrected": 0, "memory_mib": 15352, key: value}
    guest = {"nvidia": {**GUEST["nvidia"], "ecc": True}}

    run = verify(lab_file(tmp_path, guest=guest), plugin=Doctored(observations))

    assert run.ids("fail") == ({"nvidia.gpu.memory_health"} if key == "ecc_uncorrected" else set())


def test_slow_connection_cannot_tell_the_time(tmp_path: Path) -> None:
    observations = doctored("system.received", healthy()["system"]["sent"] + 9)

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.ids("inconclusive") == {"system.time"}
    assert run.status == 1


@pytest.mark.parametrize(("runs", "failed"), [(False, set()), (True, {"system.security_upgrades"})])
def test_undeclared_security_upgrades_do_not_run(tmp_path: Path, runs: bool, failed: set[str]) -> None:
    observations = doctored("system.upgrades", {"runs": runs, "reboots": False, "timer": "inactive"})

    run = verify(lab_file(tmp_path, guest={"security_upgrades": False}), plugin=Doctored(observations))

    assert run.ids("fail") == failed


def test_guest_without_gpu_has_no_gpu_checks(tmp_path: Path) -> None:
    observations = doctored("vm.mapping", None)
    del observations["vm"]["config"]["hostpci0"]

    run = verify(lab_file(tmp_path, guest={"gpu": None, "services": {}, "tenants": []}), plugin=Doctored(observations))

    assert run.status == 0
    assert not [id_ for id_ in run.ids("pass") if id_.startswith(("nvidia.", "containers."))]


def test_no_declared_model_is_not_run(tmp_path: Path) -> None:
    ollama = {"image": healthy()["containers"]["services"]["ollama"]["digests"][0], "models": []}
    guest = {"services": {**GUEST["services"], "ollama": ollama}}

    run = verify(lab_file(tmp_path, guest=guest), plugin=Doctored(healthy()))

    assert run.result("containers.ollama.gpu")["message"] == "no model declared"
    assert run.status == 2


def test_guest_without_declared_backup_has_no_backup_checks(tmp_path: Path) -> None:
    run = verify(lab_file(tmp_path, guest={"backup": None}), plugin=Doctored(healthy()))

    assert run.status == 0
    assert not [id_ for id_ in run.ids("pass") if id_.startswith("vm.backup.")]


def test_young_vm_needs_no_backup_yet_and_says_so(tmp_path: Path) -> None:
    observations = healthy()
    now = observations["backup"]["now"]
    observations["backup"] |= {"backups": [], "meta": f"creation-qemu=10.1.2,ctime={int(now) - 2 * 3600}"}

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.result("vm.backup.age")["verdict"] == "pass"
    assert run.result("vm.backup.age")["message"] == "no backup yet: the VM is 2.0 h old"


@pytest.mark.parametrize(("hours", "status"), [(26.1, 1), (25.9, 0), (30, 0)])
def test_age_is_measured_against_what_is_declared(tmp_path: Path, hours: float, status: int) -> None:
    observations = healthy()
    observations["backup"]["backups"] = [stored(observations["backup"]["now"] - hours * 3600)]
    limit = {"max_age_h": 31.0} if hours == 30 else {}
    guest = {"backup": {"storage": "nas", "schedule": "sun 02:30", "keep": {"last": 3, "monthly": 6}} | limit}
    guest["backup"]["spare_vmid"] = 901

    run = verify(lab_file(tmp_path, guest=guest), "-k", "vm.backup", plugin=Doctored(observations))

    assert run.status == status
    if status:
        assert "is 26.1 h old, expected at most 26 h" in run.result("vm.backup.age")["message"]


def passthrough(**keys: Any) -> dict[str, Any]:
    """The keys of a node with other passthrough settings."""
    return {"passthrough": {**PASSTHROUGH, **keys}}


def bare(**device: Any) -> dict[str, Any]:
    """The keys of a node that declares nothing but a card and leaves out iommu=pt."""
    return {"passthrough": {"devices": [{"address": "0000:01:00", **device}], "iommu_pt": False}}


def unprepared() -> dict[str, Any]:
    """A node that was booted with nothing of what could be declared."""
    observations = healthy()
    node = observations["hypervisor"]
    node |= {"cmdline": BOOTED + "quiet", "hugepages": {}, "modprobe": {"options": {}, "blacklist": []}}
    node["parameters"] = dict.fromkeys(node["parameters"])
    node["next_boot"] |= {"cmdline": "root=/dev/sda1 ro quiet", "pinned": None}
    node["next_boot"]["initramfs"] |= node["modprobe"]
    # Nobody sets pages aside for it.
    del observations["vm"]["config"]["hugepages"]
    return observations


def test_declared_options_are_not_asked_for_when_switched_off(tmp_path: Path) -> None:
    observations = unprepared()
    observations["hypervisor"]["devices"]["0000:02:00.0"]["group"] = "14"

    run = verify(
        lab_file(tmp_path, node=bare(allow_shared_group=True), guest={"hugepages": None}), plugin=Doctored(observations)
    )

    assert (run.status, run.ids("fail")) == (0, set())
    assert run.result("hypervisor.hugepages")["message"] == "none declared"
    assert "Ethernet network controller, igc" in run.result("hypervisor.iommu.group")["message"]


def test_old_kernel_needs_the_word_for_the_iommu_of_intel(tmp_path: Path) -> None:
    observations = unprepared()
    observations["hypervisor"]["kernel"] = observations["hypervisor"]["next_boot"]["kernel"] = "6.5.13-1-pve"
    lab = lab_file(tmp_path, node=bare(), guest={"hugepages": None})

    assert verify(lab, plugin=Doctored(observations)).ids("fail") == {
        "hypervisor.cmdline",
        "hypervisor.next_boot.cmdline",
    }
    observations["hypervisor"]["cpu"] = "AuthenticAMD"
    assert verify(lab, plugin=Doctored(observations)).ids("fail") == set()


def test_new_kernel_is_judged_before_the_reboot(tmp_path: Path) -> None:
    """As after `apt upgrade`: what runs is right, what would boot is not."""
    observations = unprepared()
    observations["hypervisor"]["next_boot"] |= {"kernel": "6.17.2-1-pve", "vfio": None}

    run = verify(lab_file(tmp_path, node=bare(), guest={"hugepages": None}), plugin=Doctored(observations))

    assert run.ids("fail") == {"hypervisor.next_boot.kernel", "hypervisor.reboot_pending"}
    assert "kernel 6.17.2-1-pve in place of 6.14.8-2-pve" in run.result("hypervisor.reboot_pending")["message"]


def test_module_that_is_built_in_need_not_be_in_the_initramfs(tmp_path: Path) -> None:
    observations = doctored("hypervisor.next_boot.vfio", "built in")
    observations["hypervisor"]["next_boot"]["initramfs"]["vfio"] = False

    assert verify(lab_file(tmp_path), plugin=Doctored(observations)).status == 0


def test_settings_stand_in_for_a_grub_configuration_that_is_not_mounted(tmp_path: Path) -> None:
    observations = healthy()
    observations["hypervisor"]["next_boot"] |= {
        "cmdline": WORDS,
        "cmdline_source": "/etc/default/grub",
        "copied": True,
    }

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.ids("fail") == set()
    assert "EFI partitions were not read" in run.result("hypervisor.next_boot.initramfs")["message"]


@pytest.mark.parametrize(
    ("keys", "failed", "said"),
    [
        ({"pcie_acs_override": None}, "hypervisor.iommu.group", "only pretend to be isolated"),
        ({"disable_idle_d3": False}, "hypervisor.options", "vfio_pci.disable_idle_d3 is not declared"),
        ({"allow_unsafe_interrupts": False}, "hypervisor.options", "allow_unsafe_interrupts is not declared"),
    ],
)
def test_what_weakens_the_node_has_to_be_declared(tmp_path: Path, keys: dict[str, Any], failed: str, said: str) -> None:
    run = verify(lab_file(tmp_path, node=passthrough(**keys)), plugin=Doctored(healthy()))

    assert run.ids("fail") == {failed}
    assert said in run.result(failed)["message"]
    assert "declare" in run.result(failed)["fix"]


def test_boot_that_was_told_to_leave_the_cards_says_so(tmp_path: Path) -> None:
    observations = doctored("hypervisor.devices.0000:01:00~0.driver", "nouveau")
    observations["hypervisor"]["cmdline"] += " gpulab_vfio=off"

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.ids("fail") == {"hypervisor.vfio.bound"}
    assert run.result("hypervisor.vfio.bound")["fix"] == "reboot pve1"


@pytest.mark.parametrize(
    ("class_", "words"),
    [("0108", "NVMe storage controller"), ("0280", "network controller"), ("1180", "class 1180")],
)
def test_members_of_a_shared_group_are_named_in_words(tmp_path: Path, class_: str, words: str) -> None:
    observations = healthy()
    observations["hypervisor"]["devices"]["0000:03:00.0"] = function("144d:a80a", class_, "nvme", "14")

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert f"0000:03:00.0 144d:a80a ({words}, nvme)" in run.result("hypervisor.iommu.group")["message"]


ONLY_CARD = passthrough(devices=[{"name": "a4000"}])


def test_card_without_address_is_the_only_one_of_its_id(tmp_path: Path) -> None:
    run = verify(lab_file(tmp_path, node=ONLY_CARD), plugin=Doctored(healthy()))

    assert (run.status, run.ids("fail")) == (0, set())
    assert run.result("hypervisor.device")["message"] == "NVIDIA RTX A4000 at 0000:01:00"


@pytest.mark.parametrize(
    ("found", "said"),
    [(["0000:01:00.0", "0000:41:00.0"], "2 cards 10de:24b0 (0000:01:00, 0000:41:00)"), ([], "no card 10de:24b0")],
)
def test_card_without_address_has_to_be_unmistakable(tmp_path: Path, found: list[str], said: str) -> None:
    card = function("10de:24b0", "0300", "vfio-pci", "14")
    observations = doctored("hypervisor.devices", dict.fromkeys(found, card))

    run = verify(lab_file(tmp_path, node=ONLY_CARD), plugin=Doctored(observations))

    assert run.ids("fail") == {"hypervisor.device"}
    assert run.ids("not run") == PLACED | {"vm.mapping"}
    assert said in run.result("hypervisor.device")["message"]
    assert "`address` of a4000" in run.result("hypervisor.device")["fix"]


def test_guest_alone_finds_its_card_on_the_node(tmp_path: Path) -> None:
    observations = doctored("vm.mapping", ["id=10de:24b0,node=pve1,path=0000:41:00"])
    lab = lab_file(tmp_path, node=ONLY_CARD)

    run = verify(lab, "--limit", "gpu01", plugin=Doctored(observations))

    assert run.ids("fail") == {"vm.mapping"}
    assert "leads to 0000:41:00 on pve1, expected 0000:01:00" in run.result("vm.mapping")["message"]
    down = verify(lab, "--limit", "gpu01", plugin=Doctored(observations, down=("pve1",)))
    assert down.result("vm.mapping")["message"] == "pve1 is not reachable"


def test_check_that_breaks_fails_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observations = healthy()
    del observations["system"]["addresses"]

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.ids("fail") == {"system.address"}
    assert "the check itself broke: KeyError: 'addresses'" in run.result("system.address")["message"]
    assert "Traceback" not in capsys.readouterr().out


def test_disruptive_checks_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    observations = doctored("engine_restart.after", LOST)

    assert verify(lab_file(tmp_path), plugin=Doctored(observations)).status == 0
    run = verify(lab_file(tmp_path), "--disruptive", plugin=Doctored(observations))

    assert (run.status, run.ids("fail")) == (1, {"containers.gpu.engine_restart.real"})
    assert "after `systemctl restart docker`: Failed" in run.result("containers.gpu.engine_restart.real")["message"]
    whole = verify(lab_file(tmp_path), "--disruptive", plugin=Doctored(doctored("engine_restart.same", False)))
    assert whole.ids("fail") == {"containers.gpu.engine_restart.real"}


def test_guest_with_podman_has_its_own_checks(tmp_path: Path) -> None:
    observations = healthy()
    observations["containers"]["engine"] |= {"version": "5.4.2", "live_restore": None}
    guest = {"engine": {"kind": "podman"}, "services": {}}

    run = verify(lab_file(tmp_path, guest=guest), plugin=Doctored(observations))

    assert run.status == 0
    assert run.ids("pass") >= {"containers.engine.active", "containers.cdi", "containers.gpu.daemon_reload"}
    assert not [id_ for id_ in run.ids("pass") if id_.startswith("containers.data_disk")]
    observations["containers"]["engine"]["version"] = "5.0.3"
    old = verify(lab_file(tmp_path, guest=guest), plugin=Doctored(observations))
    assert "Podman 5.0.3, expected 5.1 or newer" in old.result("containers.engine.version")["message"]


def test_collection_that_was_released_answers_no_search(tmp_path: Path) -> None:
    observations = healthy()
    observations["milvus"]["collections"]["astro.spectra"] |= {"loaded": False, "search": None, "rows": None}

    run = verify(lab_file(tmp_path), plugin=Doctored(observations))

    assert run.ids("fail") == {"containers.milvus.collections"}
    assert "astro.spectra is not in memory" in run.result("containers.milvus.collections")["message"]
    assert run.ids("not run") == {"containers.milvus.answers"}


def test_what_milvus_holds_is_told(tmp_path: Path) -> None:
    observations = healthy()
    assert (
        "astro.spectra: 100 found in 4 ms"
        in verify(lab_file(tmp_path), "-k", "milvus", plugin=Doctored(observations)).result(
            "containers.milvus.answers"
        )["message"]
    )
    observations["milvus"]["collections"]["astro.spectra"] |= {"rows": 0, "search": told(seconds=0.004, found=0)}

    run = verify(lab_file(tmp_path), "-k", "milvus", plugin=Doctored(observations))

    assert run.ids("fail", "not run") == set()
    assert run.result("containers.milvus.answers")["message"] == "astro.spectra: empty in 4 ms"
    assert run.result("containers.milvus.collections")["message"] == "astro.spectra: 0 rows"


@pytest.mark.parametrize(
    "keys", [{"loaded": False, "search": None}, {"indexed": 500}, {"index": {"index_type": "HNSW"}}, {"adapted": True}]
)
def test_milvus_needs_no_gpu_for_what_is_not_searched_there(tmp_path: Path, keys: dict[str, Any]) -> None:
    observations = doctored("nvidia.nvml.gpus.0.processes", [BY_OLLAMA])
    spectra = observations["milvus"]["collections"]["astro.spectra"]
    if keys.pop("adapted", False):
        spectra["index"]["adapt_for_cpu"] = "true"
    spectra |= keys

    run = verify(lab_file(tmp_path), "-k", "containers.milvus.gpu", plugin=Doctored(observations))

    assert run.result("containers.milvus.gpu")["message"] == "no collection with an index for the GPU in memory"


def test_simulated_vm_has_no_process_of_qemu(tmp_path: Path) -> None:
    observations = doctored("process", {"pid": None, "threads": [], "huge_mib": {}})
    pinning = {"vm.pinning.cpus", "vm.pinning.pages"}
    simulated = {"simulated": "rehearsal", "expected_not_run": ["vm.pinning.*"]}

    run = verify(lab_file(tmp_path, guest=simulated), plugin=Doctored(observations))
    assert (run.status, run.ids("not run"), run.ids("fail")) == (0, pinning, set())

    assert verify(lab_file(tmp_path), plugin=Doctored(observations)).ids("fail") == pinning


def test_vm_that_declares_no_cpus_is_not_asked_for_its_process(tmp_path: Path) -> None:
    observations = doctored("process", None)
    for key in ("affinity", "hugepages"):
        del observations["vm"]["config"][key]

    run = verify(lab_file(tmp_path, guest={"affinity": None, "hugepages": None}), plugin=Doctored(observations))

    assert run.status == 0
    assert not [id_ for id_ in run.ids("pass") if id_.startswith("vm.pinning.")]


def test_milvus_without_tenants_has_no_rights_to_check(tmp_path: Path) -> None:
    observations = healthy()
    observations["milvus"] |= {"tenants": {}, "foreign": {}, "collections": {}, "profiles": {}}
    milvus = {key: GUEST["services"]["milvus"][key] for key in ("image", "memory_budget_mib", "pool_init_mib")}
    tenants = [{**each, "services": ["ollama"]} for each in GUEST["tenants"]]
    guest = {"services": {"milvus": milvus, "ollama": GUEST["services"]["ollama"]}, "tenants": tenants}

    run = verify(lab_file(tmp_path, guest=guest), "-k", "containers.milvus", plugin=Doctored(observations))

    assert {"containers.milvus.tenants", "containers.milvus.isolation"} <= run.ids("pass")
    assert run.result("containers.milvus.tenants")["message"] == "no tenant may use it"
