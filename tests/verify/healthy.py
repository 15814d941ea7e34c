# SPDX-License-Identifier: MIT
"""A lab in which every promise holds, as observations that a test can doctor, and a verify run over them."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from inventory.packages import DEBIAN_13, TOOLKIT
from tests.unit.benchmark_reports import metric, of_tier_1, printed, report, steady
from verify.benchmarks import history
from verify.conftest import OBSERVATIONS, RESULTS, fixtures_of
from verify.hosts import Unreachable, Unreadable
from verify.observations import READER, Observations
from verify.verdicts import Result

ROOT = Path(__file__).parents[2]
DIGEST = "sha256:" + 64 * "a"
TOKEN = "gpulab@pve!gpulab=0f0e0d0c-1111-2222-3333-444455556666"
#: Locks einops 0.8.2.
LOCK = str(ROOT / "rehearsal/pytorch.lock")
#: Ids of containers.
IDS = {"ollama": 64 * "1", "milvus": 64 * "2", "astro": 64 * "3"}
CDI = ["nvidia.com/gpu=0", "nvidia.com/gpu=all"]

#: The settings that Ollama's server was started with.
OLLAMA = {
    "OLLAMA_HOST": "0.0.0.0:11434",
    "OLLAMA_CONTEXT_LENGTH": "8192",
    "OLLAMA_NUM_PARALLEL": "1",
    "OLLAMA_MAX_LOADED_MODELS": "1",
    "OLLAMA_MAX_QUEUE": "128",
    "OLLAMA_KEEP_ALIVE": "5m",
    "OLLAMA_LOAD_TIMEOUT": "5m",
    "OLLAMA_FLASH_ATTENTION": "1",
    "OLLAMA_KV_CACHE_TYPE": "f16",
    "OLLAMA_NO_CLOUD": "1",
    "CUDA_MPS_PIPE_DIRECTORY": "/run/nvidia-mps",
    "CUDA_MPS_LOG_DIRECTORY": "/var/log/nvidia-mps",
    "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=8192M",
}
#: Declares all that can be declared, so that each promise can be broken.
PASSTHROUGH: dict[str, Any] = {
    "devices": [{"name": "a4000", "address": "0000:01:00", "iommu_group": 14, "reset_methods": ["flr", "bus"]}],
    "blacklist": ["nouveau", "snd-hda-intel"],
    "pcie_acs_override": "downstream",
    "initcall_blacklist": ["sysfb_init", "simpledrm_init"],
    "disable_idle_d3": True,
    "allow_unsafe_interrupts": True,
    "hugepages": {"size": "1G", "count": 16},
    "kernel": "6.14.8-2-pve",
}
NODE: dict[str, Any] = {"ssh_hostname": "192.0.2.11", "passthrough": PASSTHROUGH}
WORDS = (
    "quiet iommu=pt pcie_acs_override=downstream initcall_blacklist=sysfb_init,simpledrm_init "
    "hugepagesz=1G hugepages=16"
)
GUEST: dict[str, Any] = {
    "node": "pve1",
    "vmid": 101,
    "networks": [
        {"address": "192.0.2.101/24", "gateway": "192.0.2.1"},
        {"bridge": "vmbr1", "vlan": 30, "mtu": 9000, "mac": "BC:24:11:00:00:02"},
    ],
    "nameserver": ["192.0.2.53", "192.0.2.54"],
    "searchdomain": "lab.example",
    "numa_nodes": [{"cpus": "0-3,6", "memory_mib": 16384, "host_nodes": "0", "policy": "bind"}],
    "affinity": "0-7",
    "hugepages": "1G",
    "startup": {"order": 2, "up_s": 30},
    "tags": ["gpu"],
    "description": "The lab's GPU.",
    "ssh_public_key": "ssh-ed25519 AAAA user@host",
    "image": {"url": "https://images.example/debian.qcow2", "checksum": "sha256:" + 64 * "a", "filename": "d.qcow2"},
    "nvidia": {
        "cuda": ["12.9", "13.0"],
        "power_limit_w": 120,
        "clocks": {"min_mhz": 1200, "max_mhz": 1560},
        "ecc": False,
        "mps": {"active_thread_percentage": 60, "pinned_memory_limit_mib": 8200},
    },
    "tenants": [
        {"name": "astro", "active_thread_percentage": 50, "memory_limit_mib": 6144, "priority": "below-normal"},
        {"name": "ml", "active_thread_percentage": 60},
    ],
    "backup": {"storage": "nas", "schedule": "sun 02:30", "keep": {"last": 3, "monthly": 6}, "spare_vmid": 901},
    "services": {
        "ollama": {
            "image": f"ollama/ollama@{DIGEST}",
            "models": [
                {"name": "tiny", "digest": 64 * "d"},
                {"name": "own", "gguf": "/srv/data/own.gguf", "gguf_sha256": 64 * "e"},
            ],
            "host_memory_mib": 8192,
        },
        "milvus": {
            "image": f"milvusdb/milvus@{DIGEST}",
            "memory_budget_mib": 1024,
            "pool_init_mib": 256,
            "indexes": {
                "sky": {"type": "GPU_CAGRA"},
                "flat": {"type": "HNSW", "metric": "COSINE"},
            },
            "collections": [{"name": "spectra", "tenant": "astro", "dimension": 128, "index": "sky"}],
        },
        "pytorch": {"image": f"pytorch/pytorch@{DIGEST}", "lock": LOCK},
    },
}


def torch_job() -> dict[str, Any]:
    """What a job of astro's, with its 6144 MiB of a card of 16376, says of itself."""
    environment = {
        "GPULAB_TORCH_MEMORY_FRACTION": f"{(6144 - 512) / 16376:.6f}",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=6144M",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "50",
    }
    saw = {
        "torch": "2.13.0", "cuda": "13.0", "devices": 1, "versions": {"torch": "2.13.0", "einops": "0.8.2"},
        "uid": 850, "capabilities": 0, "no_new_privileges": True, "root_writable": False,
        "environment": environment, "memory_max": "max", "changed": [], "computed": "",
        "own": ["pip", "einops"],
    }  # fmt: skip
    return {"status": 0, "saw": saw, "said": ""}


#: What a sound RTX A4000 does.
FIGURES = {
    "memory.copy": 391.0,
    "memory.triad": 388.0,
    "h2d.pinned": 25.1,
    "d2h.pinned": 26.2,
    "h2d.pageable": 11.8,
    "d2h.pageable": 10.4,
    "bidirectional.pinned": 43.0,
    "fp32.fma": 17.1,
    "tensor.fp16": 70.2,
    "tensor.bf16": 70.1,
    "tensor.tf32": 35.1,
    "tensor.int8": 140.5,
    "launch.latency": 2.4,
}


#: What its services do on it, and how it is shared.
TIER_1: dict[str, dict[str, float]] = {
    "mps": {"mps.gain": 1.9, "mps.fairness": 0.99, "mps.share": 0.97},
    "pytorch": {
        "pytorch.gemm.tf32": 33.0,
        "pytorch.gemm.fp16": 62.0,
        "pytorch.gemm.bf16": 61.5,
        "pytorch.copy": 385.0,
        "pytorch.vae": 41000.0,
    },
    "ollama": {"ollama.prompt": 2900.0, "ollama.generation": 71.0},
    "milvus": {"milvus.build": 52000.0, "milvus.recall": 0.985, "milvus.qps.1": 610.0, "milvus.qps.8": 2900.0},
}
#: The subject that each is read as.
READ_AS = {"mps": "mpsbench", "pytorch": "torchbench", "ollama": "ollamabench", "milvus": "milvusbench"}


def of_service(tool: str, began: float) -> dict[str, Any]:
    """What a program of tier 1 prints of that card; synthetic."""
    found = of_tier_1(tool, TIER_1[tool], began=began)
    if tool == "mps":
        found["metrics"]["mps.limit"] = metric("mps.limit", [0.0] * 6)
        found["series"] = {"mps.share": [[25.0, 0.26], [50.0, 0.51], [75.0, 0.76], [100.0, 1.0]]}
    return found


def benchmarks(began: float) -> dict[str, Any]:
    """What gpubench prints of that card; synthetic."""
    metrics = {name: metric(name, steady(level)) for name, level in FIGURES.items()}
    metrics |= {"memory.pattern": metric("memory.pattern", [0.0] * 4)}
    telemetry = [
        {"t": i / 2, "sm_mhz": 1560, "memory_mhz": 7001, "power_w": 118.0 + i % 3, "temperature_c": 55 + i // 4,
         "reasons": 4, "link_generation": 4, "link_width": 16}
        for i in range(30)
    ]  # fmt: skip
    return printed(began=began, duration_s=15.2, quick=True, metrics=metrics, telemetry=telemetry)


def unmeasured(verdict: str, reason: str) -> dict[str, Any]:
    """What gpubench prints where it came to measure nothing."""
    metrics = dict.fromkeys([*FIGURES, "memory.pattern"], reason)
    return benchmarks(time.time()) | {"verdict": verdict, "reason": reason, "metrics": {}, "not_run": metrics}


def lab_file(folder: Path, node: dict[str, Any] | None = None, guest: dict[str, Any] | None = None) -> Path:
    """An inventory with one node and one guest, its state below `folder`; `node` and `guest` replace keys. The guest
    was measured five times, so that there is a baseline of each figure.
    """
    state = folder / "state"
    state.mkdir(exist_ok=True)
    (state / "secrets.json").write_text(json.dumps({"pve1": {"-": {"api_token": TOKEN}}}))
    (state / "secrets.json").chmod(0o600)
    for age in range(5, 0, -1):
        began = time.time() - age * 86400
        for found in (benchmarks(began), *(of_service(tool, began) for tool in TIER_1)):
            run = history.past(report(**found), "a1b2c3d")
            assert run is not None
            history.append(state / "benchmarks/pve1/gpu01.jsonl", run)
    common = {"state_dir": str(state), "ssh_key": str(folder / "key")}
    hosts = {
        "nodes": [("@node/pve1", {**NODE, **common, **(node or {})})],
        "guests": [("@guest/gpu01", {**GUEST, **common, **(guest or {})})],
    }
    path = folder / "lab.py"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in hosts.items()))
    return path


def healthy() -> dict[str, Any]:
    """What would be read of that lab, subject by subject."""
    now = time.time()
    modprobe = {
        "options": {"vfio_pci": {"disable_idle_d3": "1"}, "vfio_iommu_type1": {"allow_unsafe_interrupts": "1"}},
        "blacklist": ["nouveau", "snd_hda_intel"],
    }
    functions = {
        "0000:00:01.0": function("8086:4c01", "0604", "pcieport", "14", bridge=True),
        "0000:01:00.0": function("10de:24b0", "0300", "vfio-pci", "14", reset_methods=["flr", "bus"]),
        "0000:01:00.1": function("10de:228b", "0403", "vfio-pci", "14"),
        "0000:02:00.0": function("8086:15f3", "0200", "igc", "15"),
    }
    versions = {"installed": "580.95.05-1", "candidate": "580.105.08-1", "priorities": {"580.105.08-1": 1000}}
    repositories = (
        "https://developer.download.nvidia.com/compute/cuda/repos",
        "https://nvidia.github.io/libnvidia-container",
    )
    return {
        "reach": {"error": "", "fix": ""},
        "hypervisor": {
            "pve_version": "pve-manager/9.1.4/5ac30304 (running kernel: 6.14.8-2-pve)",
            "cmdline": f"BOOT_IMAGE=/boot/vmlinuz-6.14.8-2-pve root=/dev/sda1 ro {WORDS}",
            "kernel": "6.14.8-2-pve",
            "cpu": "GenuineIntel",
            "iommus": ["dmar0"],
            "groups": {"14": "DMA-FQ", "15": "identity"},
            "devices": functions,
            "modules": ["igc", "vfio_pci"],
            "parameters": {"vfio_pci.disable_idle_d3": "Y", "vfio_iommu_type1.allow_unsafe_interrupts": "Y"},
            "hugepages": {"2048": 0, "1048576": 16},
            "modprobe": modprobe,
            "next_boot": {
                "kernel": "6.14.8-2-pve",
                "by": "/boot/grub/grub.cfg",
                "pinned": "6.14.8-2-pve",
                "installed": True,
                "vfio": "module",
                "cmdline": f"root=/dev/sda1 ro {WORDS}",
                "cmdline_source": "/boot/grub/grub.cfg",
                "copied": False,
                "initramfs": {
                    "path": "/boot/initrd.img-6.14.8-2-pve",
                    "vfio": True,
                    "claims": {"0000:01:00.0": "10de:24b0", "0000:01:00.1": "10de:228b"},
                    **copy.deepcopy(modprobe),
                },
            },
        },
        "api": {
            "error": "",
            "state": "",
            "version": "9.1.4",
            "vms": [
                {"id": 101, "name": "gpu01", "tags": "gpulab"},
                {"id": 300, "name": "render", "tags": "terraform;gpulab-like"},
            ],
        },
        "vm": {
            "exists": True,
            "status": "running",
            "pending": [],
            "config": {
                "tags": "gpu;gpulab",
                "description": "The lab's GPU.\ngpulab-rebuild old=local-lvm:vm-101-disk-9 run=me",
                "cpu": "host",
                "numa": 1,
                "numa0": "memory=16384,cpus=0-3;6,hostnodes=0,policy=bind",
                "affinity": "0-7",
                "hugepages": "1024",
                "startup": "up=30,order=2",
                "protection": 1,
                "ipconfig0": "gw=192.0.2.1,ip=192.0.2.101/24",
                "ipconfig1": "ip=dhcp",
                "nameserver": "192.0.2.53 192.0.2.54",
                "searchdomain": "lab.example",
                "cores": 8,
                "memory": "16384",
                "machine": "q35",
                "hostpci0": "mapping=a4000,pcie=1",
                "onboot": 1,
                "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0",
                "net1": "virtio=bc:24:11:00:00:02,bridge=vmbr1,mtu=9000,tag=30",
                "scsi0": "local-lvm:vm-101-disk-0,discard=on,iothread=1,size=64G,ssd=1",
                "scsi1": "local-lvm:vm-101-disk-1,discard=on,iothread=1,size=200G,ssd=1",
                "bios": "ovmf",
                "balloon": 0,
                "scsihw": "virtio-scsi-single",
                "boot": "order=scsi0",
                "agent": "enabled=1",
                "ciuser": "debian",
                "ciupgrade": 0,
            },
            "agent": "",
            "mapping": ["id=10de:24b0,iommugroup=14,node=pve1,path=0000:01:00,subsystem-id=10de:14ad"],
        },
        "process": {
            "pid": 4711,
            "threads": [{"name": name, "cpus": "0-7"} for name in ("kvm", "vhost-4711", "CPU 0/KVM", "CPU 1/KVM")],
            "huge_mib": {"1048576": 16384},
            "simulated": [],
        },
        "backup": {
            "job": {
                "id": "gpulab-gpu01",
                "type": "vzdump",
                "enabled": 1,
                "schedule": "sun 02:30",
                "storage": "nas",
                "vmid": "101",
                "node": "pve1",
                "mode": "snapshot",
                "prune-backups": {"keep-monthly": "6", "keep-last": "3"},
            },
            "backups": [stored(now - 90 * 3600), stored(now - 3600)],
            "error": "",
            "meta": f"creation-qemu=10.1.2,ctime={int(now) - 900 * 3600}",
            "now": now,
        },
        "system": {
            "addresses": ["127.0.0.1/8", "192.0.2.101/24"],
            "data": {
                "source": "/dev/sdb",
                "filesystem": "ext4",
                "separate": True,
                "uuid": "1b2c",
                "size_bytes": 200 * 2**30,
                "fstab": "UUID=1b2c",
                "beneath": {"entries": [], "immutable": True},
            },
            "packages": dict.fromkeys((*DEBIAN_13.base, "unattended-upgrades"), "1"),
            "upgrades": {"runs": True, "reboots": False, "timer": "active"},
            "sent": now,
            "began": now + 0.05,
            "ended": now + 0.15,
            "received": now + 0.2,
        },
        "nvidia": {
            "on_bus": ["0000:01:00.0"],
            "loaded": "580.95.05",
            "on_disk": "580.95.05",
            "library": "580.95.05",
            "firmware": ["580.105.08", "580.95.05"],
            "nouveau": {"loaded": False, "blacklisted": True},
            "next_kernel": {"running": "6.12.48+deb13-amd64", "kernel": "6.12.57+deb13-amd64", "module": "580.95.05"},
            "installed": {
                **dict.fromkeys((*DEBIAN_13.driver, "libcuda1", "libnvidia-ml1"), "580.95.05-1"),
                **dict.fromkeys(TOOLKIT, "1.20.0-1"),
                "cuda-toolkit-12-9": "12.9.1-1",
                "unattended-upgrades": "2.12",
            },
            "held": [*DEBIAN_13.driver, "libcuda1", "libnvidia-ml1", "vim"],
            "apt": {"runs": True, "blacklist": [".*nvidia", "libcuda"]},
            "cuda": {"12.9": "12.9", "13.0": "13.0"},
            "fallen": None,
            "units": {
                "gpulab-gpu-settings.service": {"active": "inactive", "enabled": "enabled"},
                "gpulab-gpu-thermal.service": {"active": "active", "enabled": "enabled"},
                "gpulab-mps.service": {"active": "active", "enabled": "enabled"},
            },
            "mps": {
                "daemons": [800],
                "percentage": {"status": 0, "says": "60.0"},
                "memory": {"status": 0, "says": "8G"},
                "servers": [{"pid": 801, "uid": 850}],
                "stranger": {"status": 1, "says": "Cannot find MPS control daemon process"},
            },
            "tenants": {"astro": profile("50", "1", "0=6144M"), "ml": profile("60", "0")},
            "policy": {
                **{name: dict(versions) for name in DEBIAN_13.driver},
                **{name: {"installed": "1.20.0-1"} for name in TOOLKIT},
            },
            "sources": {url: [{"file": "nvidia.list", "signed_by": True, "trusted": False}] for url in repositories},
            "xids": [31],
            "nvml": {
                "error": None,
                "driver": "580.95.05",
                "gpus": [
                    {
                        "name": "NVIDIA RTX A4000",
                        "id": "10de:24b0",
                        "bus": "00000000:01:00.0",
                        "memory_mib": 16376,
                        "persistence": 1,
                        "ecc": 0,
                        "ecc_pending": 0,
                        "ecc_uncorrected": 0,
                        "remapped": [0, 0, 0],
                        "accounting": 1,
                        "compute_mode": 3,
                        "power_limit_w": 120.0,
                        "power_enforced_w": 120.0,
                        "power_default_w": 140.0,
                        "temperature_c": 61,
                        "temperature_max_c": 90,
                        "replays": [7, 7],
                        "processes": [
                            computing(801, "nvidia-cuda-mps-server", 30, "/system.slice/gpulab-mps.service"),
                            computing(900, "ollama", 5000, f"/system.slice/docker-{IDS['ollama']}.scope"),
                            computing(901, "milvus", 800, f"/system.slice/docker-{IDS['milvus']}.scope"),
                            computing(902, "python3", 6100, f"/system.slice/docker-{IDS['astro']}.scope"),
                        ],
                        "work": {
                            "by": [],
                            "error": "",
                            "generation": 4,
                            "width": 16,
                            "clock_mhz": 1545,
                            "use": 40,
                            "reasons": 0x4,
                        },
                    }
                ],
            },
        },
        "containers": {
            "engine": {
                "active": "active",
                "version": "26.1.5+dfsg1",
                "cdi_folders": ["/etc/cdi", "/var/run/cdi"],
                "live_restore": True,
            },
            "cdi": CDI,
            "specifications": {"/var/run/cdi/nvidia.yaml": specification()},
            "loaded": "580.95.05",
            "healing": {"active": "active", "enabled": "enabled", "age_s": 42.0, "alarms": {}},
            "data": {
                "mounted": True,
                "containers": [
                    ours("ollama", service="ollama"),
                    ours("milvus", service="milvus"),
                    ours("astro-1", IDS["astro"], tenant="astro"),
                ],
                "bound": ["gpulab-containers.service", "gpulab-data-disk.service"],
            },
            "services": {
                "ollama": {
                    **served("ollama/ollama", "/srv/data/ollama", 11434, memory_mib=8192),
                    "version": {"json": {"version": "0.32.0"}},
                    "tags": {"json": {"models": tags()}},
                    "show own": {"json": {"modelfile": f"# FROM own\n\nFROM /models/blobs/sha256-{64 * 'e'}\n"}},
                    "environment": dict(OLLAMA),
                },
                "milvus": served("milvusdb/milvus", "/srv/data/milvus", 19530, 9091),
            },
        },
        "access": reached(),
        "milvus": searched(),
        "pytorch": {"digests": [f"pytorch/pytorch@{DIGEST}"], "simulated": [], "job": torch_job()},
        "ports": {"11434": False, "19530": False, "9091": False},
        "daemon_reload": disturbed(),
        "engine_restart": disturbed(),
        "gpubench": benchmarks(now),
        **{READ_AS[tool]: of_service(tool, now) for tool in TIER_1},
        "ollama_load": {"load": {"json": {"done": True}}, "ps": {"json": {"models": [ps_entry(2**30)]}}},
    }


def profile(percentage: str, priority: str, memory: str | None = None) -> dict[str, str]:
    """The environment of a tenant."""
    return {
        "CUDA_MPS_PIPE_DIRECTORY": "/run/nvidia-mps",
        "CUDA_MPS_LOG_DIRECTORY": "/var/log/nvidia-mps",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": percentage,
        "CUDA_MPS_CLIENT_PRIORITY": priority,
        **({"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": memory} if memory else {}),
    }


def function(
    id_: str, class_: str, driver: str | None, group: str, bridge: bool = False, reset_methods: list[str] | None = None
) -> dict[str, Any]:
    """One PCI function as the node's script describes it."""
    return {
        "id": id_,
        "class": class_,
        "driver": driver,
        "group": group,
        "bridge": bridge,
        "reset_methods": reset_methods,
    }


def stored(ctime: float, **keys: Any) -> dict[str, Any]:
    """A backup of VM 101 as the node's script describes it."""
    volid = f"nas:backup/vzdump-qemu-101-{int(ctime)}.vma.zst"
    return {"volid": volid, "ctime": int(ctime), "size": 2**30, "verification": None, **keys}


def specification(**keys: Any) -> dict[str, Any]:
    """A CDI specification of the GPU as the guest's script describes it."""
    return {"devices": ["0", "all"], "digest": 64 * "c", "versions": ["580.95.05"], "missing": [], **keys}


def computing(pid: int, name: str, memory_mib: int | None, cgroup: str) -> dict[str, Any]:
    """A process on the GPU as the guest's script describes it."""
    return {"pid": pid, "name": name, "uid": 850, "memory_mib": memory_mib, "cgroup": cgroup}


def ours(name: str, id_: str = "", service: str = "", tenant: str = "") -> dict[str, Any]:
    """A container of ours as the guest's script lists it."""
    return {
        "name": name,
        "id": id_ or IDS[name],
        "service": service,
        "tenant": tenant,
        "running": True,
        "gpu": "cdi",
        "folders": [{"source": f"/srv/data/{name}", "written": True, "on_data_disk": True}],
    }


def served(image: str, folder: str, *ports: int, memory_mib: int | None = None) -> dict[str, Any]:
    """A service's container as the guest's script describes it."""
    name = folder.rpartition("/")[2]
    return {
        "exists": True,
        "running": True,
        "status": "running",
        "health": "healthy",
        "digests": [f"{image}@{DIGEST}"],
        "storage": {"inside": "/data", "outside": folder, "on_data_disk": True},
        "listens": [
            *[{"address": "127.0.0.1", "port": port, "program": "docker-proxy"} for port in ports],
            {"address": "192.0.2.101", "port": ports[0], "program": "nginx"},
        ],
        "published": [f"127.0.0.1:{port}" for port in ports],
        "limits": {"memory_mib": memory_mib, "pids": None},
        "privileges": {
            "privileged": False,
            "read_only": True,
            "capabilities": 0,
            "no_new_privileges": True,
            "unconfined": False,
            "uid": 850,
            "ipc": "host",
            "networks": [f"gpulab-{name}"],
        },
        "nvidia_smi": "GPU 0: NVIDIA RTX A4000 (UUID: GPU-1)",
        "gpus": ["GPU 0: NVIDIA RTX A4000 (UUID: GPU-1)"],
    }


def told(status: str = "OK", said: str = "", **keys: Any) -> dict[str, Any]:
    """What Milvus said to a request."""
    return {"status": status, "said": said, **keys}


def searched() -> dict[str, Any]:
    """Milvus with two tenants and a collection, as the guest's script describes it."""
    attempts = ("read", "search", "insert", "make collections", "drop collections")
    denied = {what: told("PERMISSION_DENIED", "permission deny") for what in attempts}
    tenant = {
        "login": told(),
        "own": {what: told("REFUSED", "collection not found") for what in attempts},
        "managing": {
            what: told("PERMISSION_DENIED", "permission deny")
            for what in ("list users", "make users", "make databases")
        },
    }
    graph = {"intermediate_graph_degree": "128", "graph_degree": "64", "build_algo": "IVF_PQ"}
    graph |= {"cache_dataset_on_device": "false", "adapt_for_cpu": "false"}
    spectra = {
        "told": told(),
        "dimension": 128,
        "loaded": True,
        "rows": 20_000,
        "index": {"index_type": "GPU_CAGRA", "metric_type": "L2", **graph},
        "indexed": 20_000,
        "search": told(seconds=0.004, found=100),
    }
    strangers = ("nobody", "root with Milvus' first password", "root with a wrong password", "a user that nobody has")
    return {
        "error": "",
        "health": "OK",
        "unguarded": [],
        "version": "2.6.10",
        "root": told(),
        "strangers": {who: told("UNAUTHENTICATED", "auth check failure") for who in strangers},
        "tenants": {name: {**copy.deepcopy(tenant), "roles": [f"gpulab_{name}"]} for name in ("astro", "ml")},
        "foreign": {
            "astro in ml": dict(denied),
            "ml in astro": {**denied, "read spectra": told("PERMISSION_DENIED", "permission deny")},
        },
        "collections": {"astro.spectra": spectra},
        "profiles": {
            "sky": {
                "index_type": "GPU_CAGRA", "metric_type": "L2", "params": {**graph, "graph_degree": 64},
                "search": {"itopk_size": 128}, "top_k": 100,
            },
            "flat": {
                "index_type": "HNSW", "metric_type": "COSINE", "params": {"M": 16, "efConstruction": 200},
                "search": {"ef": 128}, "top_k": 100,
            },
        },
    }  # fmt: skip


def let_in(status: int = 200, **keys: Any) -> dict[str, Any]:
    """What a caller got from the proxy."""
    challenge = 'Bearer realm="ollama"' if status == 401 else None
    return {"status": status, "error": "", "challenge": challenge, "request": None, **keys}


def reached() -> dict[str, Any]:
    """The proxy as the control machine and the guest see it."""
    tls = {"error": "", "protocol": "TLSv1.3", "days": 396.9}
    answers = {
        "strangers": {"nobody": let_in(401), "a stranger": let_in(401), "astro with its secret of milvus": let_in(401)},
        "tenants": {"astro": let_in(request="r1"), "ml": let_in(request="r2")},
        "managing": let_in(403),
    }
    line = {"time": "2026-11-29T04:00:00+00:00", "service": "ollama", "method": "GET", "path": "/api/version"}
    line |= {"status": 200, "bytes": 300, "seconds": 0.001, "client": "192.0.2.9"}
    listens = [
        {"address": "0.0.0.0", "port": 22, "program": "sshd"},
        {"address": "192.0.2.101", "port": 11434, "program": "nginx"},
        {"address": "192.0.2.101", "port": 19530, "program": "nginx"},
    ]
    return {
        "services": {"ollama": {"tls": dict(tls), "answers": answers}, "milvus": {"tls": dict(tls)}},
        "guest": {
            "active": "active",
            "enabled": "enabled",
            "refused": "",
            "files": {
                "/etc/nginx/gpulab": {"mode": 0o700, "uid": 0, "folder": True},
                "/etc/nginx/gpulab/server.pem": {"mode": 0o644, "uid": 0, "folder": False},
                "/etc/nginx/gpulab/server.key": {"mode": 0o600, "uid": 0, "folder": False},
            },
            "log": {
                "mode": 0o640,
                "broken": 0,
                "lines": [{**line, "tenant": "astro", "request": "r1"}, {**line, "tenant": "ml", "request": "r2"}],
            },
            "listens": listens,
        },
        "open": copy.deepcopy(listens),
    }


def disturbed(**keys: Any) -> dict[str, Any]:
    """A GPU container of verify's own that went through a disturbance."""
    said = {"status": 0, "output": "GPU 0: NVIDIA RTX A4000 (UUID: GPU-1)"}
    return {"error": "", "before": said, "after": said, "same": True, "simulated": [], **keys}


def tags(digest: str = 64 * "d") -> list[dict[str, str]]:
    """Ollama's models, one of them of that digest."""
    return [{"name": "tiny:latest", "digest": digest}, {"name": "own:latest", "digest": 64 * "f"}]


def ps_entry(size_vram: int, context_length: int = 8192) -> dict[str, Any]:
    return {"name": "tiny:latest", "size_vram": size_vram, "context_length": context_length}


class Doctored:
    """Answers in place of the hosts. An exception in the place of a subject is raised."""

    def __init__(self, observations: dict[str, Any], down: tuple[str, ...] = ()) -> None:
        self.observations = observations
        self.down = down

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        config.stash[READER] = self.read

    def read(self, host: str, subject: str) -> dict[str, Any]:
        if host in self.down and subject not in ("api", "vm"):
            if subject == "reach":
                return {"error": f"{host}: no SSH to root@192.0.2.11:22: Connection refused", "fix": "its console"}
            raise Unreachable("refused", "its console")
        found = self.observations[subject]
        if isinstance(found, Exception):
            raise found
        answer: dict[str, Any] = copy.deepcopy(found)
        return answer


#: Fixtures by which a check reads a subject of another name.
READS = {"pci_tree": "hypervisor"}


class Series(Doctored):
    """The checks, collected once and run again for each of these observations, which may differ in one subject.

    A check is run when it reads that subject; all are for the first of it. None may read what its fixtures do not name.
    """

    def __init__(self, subject: str, observations: Sequence[dict[str, Any]]) -> None:
        super().__init__(healthy())
        self.subject = subject
        self.series = observations
        self.judged: list[Judged] = []
        self._reads: frozenset[str] = frozenset()

    def read(self, host: str, subject: str) -> dict[str, Any]:
        assert subject in self._reads, f"reads {subject}, which is none of its fixtures"
        return super().read(host, subject)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        stash = session.config.stash
        stash[OBSERVATIONS].close()
        whole: dict[str, Result] = {}
        for number, observations in enumerate(self.series):
            self.observations, stash[RESULTS] = observations, {}
            for item in session.items:
                self._reads = frozenset(READS.get(name, name) for name in fixtures_of(item))
                if number == 0 or self.subject in self._reads:
                    # Nothing is read ahead: what a check reads, it reads while it runs.
                    stash[OBSERVATIONS] = Observations(self.read)
                    session.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            self.judged.append(Judged([asdict(result) for result in stash[RESULTS].values()]))
            whole = whole or stash[RESULTS]
        # The report that is written now is of a whole run.
        stash[RESULTS] = whole
        return True


def api_refused() -> dict[str, Any]:
    """The observations of a lab whose token was revoked."""
    state = "the API of pve1 refuses the token"
    refused = {"error": "pve1: https://192.0.2.11:8006 refuses the token", "state": state, "version": None, "vms": []}
    return {**healthy(), "api": refused, "vm": Unreadable(state)}


@dataclass(frozen=True)
class Judged:
    """What the checks came to."""

    results: list[dict[str, Any]]

    def ids(self, *verdicts: str) -> set[str]:
        """Ids of the checks that came to one of these verdicts."""
        return {result["id"] for result in self.results if result["verdict"] in verdicts}

    def result(self, id_: str) -> dict[str, Any]:
        found = [result for result in self.results if result["id"] == id_]
        assert len(found) == 1, f"{len(found)} results of {id_}"
        return found[0]


@dataclass(frozen=True)
class Verified(Judged):
    """A verify run that has ended."""

    status: int
    json: dict[str, Any]
    html: str


#: Whole runs of this test, for the table of `make test-verify`.
VERIFIED: list[Verified] = []


def verify(lab: Path, *options: str, plugin: object | None = None, only: str = "verify") -> Verified:
    """Run verify, or `only` a folder or file of it, inside of this process, as `pytest verify --lab` does."""
    folder = lab.parent / "report"
    arguments = [str(ROOT / only), f"--rootdir={ROOT}", f"--lab={lab}", f"--report={folder}", "--benchmarks=full"]
    # The last one would collect garbage ten times a run, for what the tests' own pytest tells as well.
    quiet = ["-q", *(f"-pno:{name}" for name in ("cacheprovider", "hypothesispytest", "unraisableexception"))]
    status = int(pytest.main([*arguments, *quiet, *options], plugins=[plugin] if plugin else []))
    report = json.loads((folder / "verify.json").read_text())
    VERIFIED.append(Verified(report["results"], status, report, (folder / "index.html").read_text()))
    return VERIFIED[-1]
