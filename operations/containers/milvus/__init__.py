# SPDX-License-Identifier: MIT
"""Milvus: its container, the accounts of the tenants, and the declared collections with their indexes."""

from operations.containers.milvus.backup import backed_up, installed, restored
from operations.containers.milvus.service import Passwords, milvus, milvus_spec, passwords_of

__all__ = ["Passwords", "backed_up", "installed", "milvus", "milvus_spec", "passwords_of", "restored"]
