# SPDX-License-Identifier: MIT
"""The clients of the services as users have them, with the lab's CA and a tenant's token."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import ollama
import openai
from pymilvus import MilvusClient

import inventory
from inventory import Guest
from inventory.access import token
from inventory.secrets import Secrets
from tests.lab.commands import INVENTORY


def guest_of(lab: str = INVENTORY) -> Guest:
    return inventory.load(lab).guests["gpu01"]


def token_of(tenant: str, service: str = "ollama") -> str:
    """A tenant's token, or its password at Milvus, as the lab's secrets have it now."""
    lab = inventory.load(INVENTORY)
    guest = lab.guests["gpu01"]
    found = Secrets(guest.state).get(lab.node_of(guest).cluster_name, token(service, tenant), guest.name)
    assert found is not None, f"{tenant} has no secret of {service}"
    return found


def url_of(service: str = "ollama") -> str:
    guest = guest_of()
    return f"https://{guest.address.ip}:{guest.services.served()[service].port}"


def ca() -> str:
    return str(guest_of().services_ca)


@contextmanager
def ollama_client(tenant: str | None = None, value: str | None = None) -> Iterator[ollama.Client]:
    """Ollama's own Python client; with neither: without a token."""
    secret = token_of(tenant) if tenant else value
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    client = ollama.Client(host=url_of(), headers=headers, verify=ca(), timeout=60)
    try:
        yield client
    finally:
        client._client.close()


@contextmanager
def openai_client(value: str) -> Iterator[openai.OpenAI]:
    """OpenAI's Python client, which sends its key as a bearer token."""
    with httpx.Client(verify=ca()) as http:
        yield openai.OpenAI(base_url=f"{url_of()}/v1", api_key=value, http_client=http, max_retries=0)


@contextmanager
def milvus_client(token: str, database: str) -> Iterator[MilvusClient]:
    """pymilvus, with `user:password` as its token."""
    client = MilvusClient(uri=url_of("milvus"), token=token, db_name=database, server_pem_path=ca(), timeout=20)
    try:
        yield client
    finally:
        client.close()


def curl(path: str, value: str | None = None, *words: str, service: str = "ollama") -> tuple[int, str]:
    """HTTP status and body. The token goes over stdin: other users of a machine see each other's command lines."""
    settings = f'url = "{url_of(service)}{path}"\n'
    settings += f'header = "Authorization: Bearer {value}"\n' if value else ""
    command = ["curl", "--silent", "--config", "-", "--cacert", ca(), "--write-out", "\n%{http_code}", *words]
    done = subprocess.run(command, input=settings, capture_output=True, text=True, timeout=60)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body
