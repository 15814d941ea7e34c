# SPDX-License-Identifier: MIT
"""The embedded lab (`make lab-up`): the same models as a real lab, with what the lab wrote down about itself.

Simulated: see the README's table of stand-ins.
"""

import json
import os
from pathlib import Path

import inventory
from inventory import InventoryError

_cache = Path(os.environ.get("GPULAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "gpulab")
# A copy of this file with other words in it lies elsewhere.
_rehearsal = Path(inventory.__file__).parent.parent / "rehearsal"
_state = _cache.expanduser() / "lab"
try:
    _lab = json.loads((_state / "lab.json").read_text())
except FileNotFoundError:
    raise InventoryError("The rehearsal lab is not up.", f"Expected {_state / 'lab.json'}.", "make lab-up") from None

_everywhere = {
    "state_dir": str(_state / "state"),
    "ssh_key": str(_state / "ssh/id_ed25519"),
    "simulated": "rehearsal lab: PCI tree, IOMMU, NVIDIA driver and GPU, VM hardware and Ollama are stand-ins",
}

#: The stand-in's only model: the same bytes each time that it is built, so the same digest.
_tiny = {"name": "tiny", "digest": "83fa9a90c7811f059549bbfa4be08cd6f712cd8fe6812c472b01125b84829fb3"}

nodes = [
    (
        f"@node/{name}",
        {
            **_everywhere,
            "ssh_hostname": address,
            "passthrough": {"devices": [{"name": "a4000", "address": "0000:01:00", "iommu_group": 14}]},
            "reboot_timeout_s": 120,
            "allow_guest_shutdown": True,
        },
    )
    for name, address in _lab["nodes"].items()
]

guests = [
    (
        f"@guest/gpu{number:02}",
        {
            **_everywhere,
            "node": node,
            "vmid": 100 + number,
            "address": f"{_lab['network']}.{100 + number}/24",
            "gateway": f"{_lab['network']}.1",
            "nameserver": _lab["nameserver"],
            "distribution": distribution,
            "image": _lab["cloud_images"][distribution],
            "cores": 2,
            "memory_mib": 2048,
            "system_disk_gib": 16,
            "data_disk": {"size_gib": 4},
            "backup": {"storage": "local", "spare_vmid": 900 + number},
            "boot_timeout_s": 180,
            "nvidia": {
                **_lab["nvidia"],
                "power_limit_w": 120,
                "clocks": {"min_mhz": 300, "max_mhz": 1800},
                # The lab is not asked to wait for a card to get cold.
                "thermal": {"interval_s": 2},
                "mps": {"active_thread_percentage": 80, "pinned_memory_limit_mib": 12288},
            },
            "tenants": [
                {"name": "astro", "active_thread_percentage": 60, "memory_limit_mib": 4096},
                {
                    "name": "ml",
                    "active_thread_percentage": 40,
                    "memory_limit_mib": 2048,
                    "priority": "below-normal",
                },
            ],
            "engine": _lab.get("engine", {}),
            "healing": {"interval_s": 5, "grace_s": 5},
            # The simulated card runs no code, so MPS' server ends as soon as it starts, and there is nothing to
            # measure; PyTorch is built for the CPU.
            "expected_not_run": [
                "nvidia.mps.server",
                "containers.pytorch.cuda",
                "benchmarks.gpu.*",
                "benchmarks.mps.*",
                "benchmarks.pytorch.gemm.tf32",
            ],
            "registry_ca": _lab["registry_ca"],
            "python_index": _lab["python_index"],
            "services": {
                "ollama": {
                    "image": _lab["images"]["ollama"],
                    "models": [_tiny],
                    "max_queue": 16,
                    "memory_budget_mib": 6144,
                },
                # The lab's server is built for the CPU, so its collection has an index of the CPU.
                "milvus": {
                    "image": _lab["images"]["milvus"],
                    "memory_budget_mib": 3072,
                    "indexes": {
                        "spectra": {"type": "HNSW", "metric": "L2"},
                        "spectra-gpu": {"type": "GPU_CAGRA", "metric": "L2", "adapt_for_cpu": True, "ef": 128},
                    },
                    "collections": [{"name": "spectra", "tenant": "astro", "dimension": 128, "index": "spectra"}],
                },
                "pytorch": {"image": _lab["images"]["pytorch"], "lock": str(_rehearsal / "pytorch.lock")},
            },
        },
    )
    for number, (node, distribution) in enumerate(zip(_lab["nodes"], _lab["guests"], strict=True), start=1)
]
