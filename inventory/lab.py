# SPDX-License-Identifier: MIT
"""Your lab: edit this file. Every field, its unit and its default stand in inventory/schema.py.

make bootstrap LAB=inventory/lab.py         once: role, user and API token on the node
pyinfra inventory/lab.py deploy.py --dry    see
pyinfra inventory/lab.py deploy.py          deploy
"""

nodes = [
    (
        "@node/pve1",
        {
            "ssh_hostname": "192.0.2.11",
            # `lspci -nn | grep -i nvidia` on the node shows the address.
            "passthrough": {"devices": [{"name": "a4000", "address": "0000:01:00"}]},
        },
    ),
]

guests = [
    (
        "@guest/gpu01",
        {
            "node": "pve1",
            "vmid": 101,
            "address": "192.0.2.101/24",
            "gateway": "192.0.2.1",
            "image": {
                # Take the newest of https://cloud.debian.org/images/cloud/trixie/ and its line in SHA512SUMS.
                "url": "https://cloud.debian.org/images/cloud/trixie/20251117-2299/debian-13-genericcloud-amd64-20251117-2299.qcow2",
                "checksum": "sha512:" + 128 * "0",
                "filename": "debian-13.qcow2",
            },
            # Who shares the card, and what each may use of it: docs/access.md, docs/pytorch.md.
            "tenants": [{"name": "astro", "memory_limit_mib": 4096}],
            # Beside it `milvus` (docs/milvus.md) and `pytorch` (docs/pytorch.md), as you need them.
            "services": {"ollama": {"image": "ollama/ollama@sha256:" + 64 * "0", "models": ["llama3.2:3b"]}},
        },
    ),
]
