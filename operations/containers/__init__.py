# SPDX-License-Identifier: MIT
"""The container engine and the services of ours that run in it."""

from operations.containers.container import container
from operations.containers.engine import engine
from operations.containers.ollama import ollama, ollama_spec
from operations.containers.proxy import declared, proxy
from operations.containers.repository import repository
from operations.containers.spec import ContainerSpec

__all__ = ["ContainerSpec", "container", "declared", "engine", "ollama", "ollama_spec", "proxy", "repository"]
