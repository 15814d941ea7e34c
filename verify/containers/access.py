# SPDX-License-Identifier: MIT
"""The services as somebody on the network meets them: their certificates, and whom the proxy lets in."""

from __future__ import annotations

import http.client
import secrets
import socket
import ssl
import time
from typing import Any

from cryptography import x509

from inventory import Guest, Lab
from inventory.access import BY_TOKEN, token, trusted
from inventory.secrets import Secrets

#: Seconds until the proxy is given up.
ANSWER_S = 15.0
#: What a service answers at once.
PROBES = {"ollama": "/api/version"}
#: What manages models, which users must not.
MANAGING = "/api/pull"
FOLDER, LOG = "/etc/nginx/gpulab", "/var/log/nginx/gpulab.log"


def observe(lab: Lab, guest: Guest) -> dict[str, Any]:
    """Each served service: its `tls`, and of those with tokens what each kind of caller gets (`answers`)."""
    kept, cluster = Secrets(guest.state), lab.node_of(guest).cluster_name

    def secret(service: str, tenant: str) -> str | None:
        return kept.get(cluster, token(service, tenant), guest.name)

    found: dict[str, Any] = {}
    for service, each in guest.services.served().items():
        found[service] = {"tls": tls(guest, each.port)}
        if service not in BY_TOKEN:
            continue
        callers: dict[str, str | None] = {"nobody": None, "a stranger": secrets.token_urlsafe(32)}
        mine = {}
        for tenant in guest.tenants:
            value = secret(service, tenant.name)
            if tenant.may_use(service):
                mine[tenant.name] = value
            elif value is not None:
                callers[f"{tenant.name}, who may not use it"] = value
            for other in guest.services.served():
                foreign = secret(other, tenant.name)
                if other != service and foreign is not None:
                    callers[f"{tenant.name} with its secret of {other}"] = foreign
        first = next((value for value in mine.values() if value is not None), None)
        found[service]["answers"] = {
            "strangers": {who: ask(guest, each.port, PROBES[service], value) for who, value in callers.items()},
            "tenants": {
                who: None if value is None else ask(guest, each.port, PROBES[service], value)
                for who, value in mine.items()
            },
            "managing": None if first is None else ask(guest, each.port, MANAGING, first, "POST", b"{}"),
        }
    return found


def context_of(guest: Guest) -> tuple[ssl.SSLContext, str]:
    """What checks the certificate, and the name that it must be for."""
    certificate, name = trusted(guest)
    context = ssl.create_default_context(cafile=str(certificate))
    # A given certificate vouches for itself; whoever signed it need not be known here.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context, name


def tls(guest: Guest, port: int) -> dict[str, Any]:
    """`error`: why a client refuses the connection; otherwise the `protocol`, and `days` that the certificate lasts."""
    nothing: dict[str, Any] = {"error": "", "protocol": None, "days": None}
    try:
        context, name = context_of(guest)
        with socket.create_connection((str(guest.address.ip), port), timeout=ANSWER_S) as plain:
            with context.wrap_socket(plain, server_hostname=name) as connection:
                shown = connection.getpeercert(binary_form=True)
                protocol = connection.version()
    except (OSError, ValueError) as error:
        return {**nothing, "error": getattr(error, "verify_message", None) or str(error)}
    if shown is None:
        return {**nothing, "error": "it shows no certificate"}
    ends = x509.load_der_x509_certificate(shown).not_valid_after_utc.timestamp()
    return {**nothing, "protocol": protocol, "days": (ends - time.time()) / 86400}


def ask(
    guest: Guest, port: int, path: str, value: str | None, method: str = "GET", body: bytes | None = None
) -> dict[str, Any]:
    """`status` (0: no answer, and the `error`), `challenge` and the `request`'s id in the proxy's log."""
    headers = {} if value is None else {"Authorization": f"Bearer {value}"}
    try:
        context, name = context_of(guest)
        connection = http.client.HTTPSConnection(name, port, timeout=ANSWER_S, context=context)
        plain = socket.create_connection((str(guest.address.ip), port), timeout=ANSWER_S)
        connection.sock = context.wrap_socket(plain, server_hostname=name)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            answer.read()
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return {"status": 0, "error": str(error), "challenge": None, "request": None}
    return {
        "status": answer.status,
        "error": "",
        "challenge": answer.getheader("WWW-Authenticate"),
        "request": answer.getheader("X-Request-ID"),
    }


def requests_of(services: dict[str, Any]) -> dict[str, str]:
    """The id of each request that a tenant's token was let in with, and whose it was."""
    return {
        answer["request"]: tenant
        for each in services.values()
        for tenant, answer in each.get("answers", {}).get("tenants", {}).items()
        if answer is not None and answer["request"] is not None
    }
