# SPDX-License-Identifier: MIT
"""Backups of Milvus' collections, their restore, and the check that a new server answers as the one before it.

The work is done on the guest by `gpulab-milvus`, which the step of Milvus writes there; docs/milvus.md says how.
"""

from __future__ import annotations

import json

from operations.files import File
from operations.remote import program

PROGRAM = "/usr/local/bin/gpulab-milvus"
SETTINGS = "/etc/gpulab/milvus-backup.json"
#: The tools' own Python: see service.py.
PYTHON = "/opt/gpulab/milvus-tools/bin/python"


def folder(data: str) -> str:
    """Where the backups lie, on the data disk; root's alone."""
    return f"{data}/milvus-backups"


def wanted_files(data: str, keep: int) -> dict[str, File]:
    """gpulab-milvus, and what it reads."""
    text = program(__file__, "client", "store", "rows", "answers", "gpulab_milvus")
    settings = {"folder": folder(data), "disk": data, "keep": keep}
    return {
        PROGRAM: File(f"#!{PYTHON} -I\n{text}\n", 0o755),
        SETTINGS: File(json.dumps(settings, indent=2) + "\n"),
    }
