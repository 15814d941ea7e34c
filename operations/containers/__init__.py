# SPDX-License-Identifier: MIT
"""The container engine and the services of ours that run in it."""

from operations.containers import milvus
from operations.containers.container import container, undeclared
from operations.containers.engine import engine
from operations.containers.healing import healing, watched
from operations.containers.ollama import ollama, ollama_spec
from operations.containers.proxy import proxy, proxy_of
from operations.containers.pytorch import pytorch
from operations.containers.repository import repository
from operations.containers.rotate import rotated
from operations.containers.spec import ContainerSpec

__all__ = [
    "ContainerSpec",
    "container",
    "engine",
    "healing",
    "milvus",
    "ollama",
    "ollama_spec",
    "proxy",
    "proxy_of",
    "pytorch",
    "repository",
    "rotated",
    "undeclared",
    "watched",
]
