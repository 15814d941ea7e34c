# SPDX-License-Identifier: MIT
"""The container engine and the services of ours that run in it."""

from operations.containers.container import container
from operations.containers.engine import engine
from operations.containers.ollama import ollama, ollama_spec
from operations.containers.proxy import proxy, proxy_of
from operations.containers.repository import repository
from operations.containers.rotate import rotated
from operations.containers.spec import ContainerSpec

__all__ = [
    "ContainerSpec",
    "container",
    "engine",
    "ollama",
    "ollama_spec",
    "proxy",
    "proxy_of",
    "repository",
    "rotated",
]
