# SPDX-License-Identifier: MIT
"""New bearer tokens without downtime: the new one is stored, let in beside the old, tried, and the old one dropped.

A run that was killed is continued by the next: as long as the secrets hold a previous token, no third one is made.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inventory import GpulabError, Guest, Lab
from inventory.access import BY_TOKEN, tenants_of, token, trusted
from inventory.secrets import Secrets, previous_of
from operations import step
from operations.containers.proxy import applied, decide, proxy_of, read

#: Seconds until a proxy that does not answer is given up.
ANSWER_S = 15.0
#: What each service answers at once, with nothing to compute.
PROBES = {"ollama": "/api/version"}


@dataclass(frozen=True)
class Target:
    """One token that is to be replaced."""

    service: str
    tenant: str

    @property
    def name(self) -> str:
        return token(self.service, self.tenant)

    def __str__(self) -> str:
        return f"{self.service}, {self.tenant}"


def targets(lab: Lab, guest: Guest, words: Mapping[str, Any]) -> list[Target]:
    """The guest's tokens that the run's words choose; all of them without.

    Raises:
        GpulabError: nobody in the lab has that name, or the service has no tokens.
    """
    tenant, service = words.get("tenant"), words.get("service")
    known = {each.name for other in lab.guests.values() for each in other.tenants}
    if tenant is not None and tenant not in known:
        raise GpulabError(
            f"--data tenant={tenant}: no guest has such a tenant; nothing was changed",
            f"Expected one of: {', '.join(sorted(known)) or 'none is declared'}.",
        )
    if service is not None and service not in BY_TOKEN:
        raise GpulabError(
            f"--data service={service}: it has no bearer tokens; nothing was changed",
            f"Expected one of: {', '.join(BY_TOKEN)}.",
        )
    if guest.access is None:
        return []
    return [
        Target(name, each)
        for name in guest.services.served()
        if name in BY_TOKEN and service in (None, name)
        for each in tenants_of(guest, name)
        if tenant in (None, each)
    ]


@step.step
def rotated(lab: Lab, guest: Guest, words: Mapping[str, Any]) -> step.Commands:
    """
    Give tenants new tokens; the previous ones end once the new ones were answered, or stay with `keep_previous`.

    nginx takes each change up by a reload. Requests in work go on.

    + words: `tenant`, `service` (none: all), `keep_previous`
    """
    chosen = targets(lab, guest, words)
    keep = bool(words.get("keep_previous"))
    if not chosen:
        step.noop("no token of this guest is meant")
        return
    secrets, cluster = Secrets(guest.state), lab.node_of(guest).cluster_name
    pending = [each for each in chosen if secrets.get(cluster, previous_of(each.name), guest.name) is not None]
    fresh = [each for each in chosen if each not in pending]
    for each in fresh:
        step.changes(f"new token: {each}", ("the previous one stays valid",) if keep else ())
    for each in pending:
        step.changes(f"token: {each}: " + ("both stay valid" if keep else "the previous one ends"))
    yield step.call(begin, secrets, cluster, guest.name, fresh)
    yield from _taken_up(lab, guest)
    yield step.call(try_out, guest, cluster, secrets, chosen)
    if keep:
        return
    yield from _taken_up(lab, guest, [each.name for each in chosen])
    yield step.call(end, secrets, cluster, guest.name, chosen)


def begin(secrets: Secrets, cluster: str, host: str, fresh: Sequence[Target]) -> None:
    """Store the new tokens, and the old ones as previous."""
    for each in fresh:
        secrets.rotate(cluster, each.name, host)


def end(secrets: Secrets, cluster: str, host: str, chosen: Sequence[Target]) -> None:
    """Forget the previous tokens, which nobody accepts any more."""
    for each in chosen:
        secrets.drop(cluster, previous_of(each.name), host)


def _taken_up(lab: Lab, guest: Guest, without_previous: Sequence[str] = ()) -> step.Commands:
    """Have nginx run with what the secrets hold now."""
    wanted = proxy_of(lab, guest, without_previous)
    found = read(wanted)
    actions = decide(found, wanted)
    if actions.install or not found.get("files", {}).get("/etc/nginx/conf.d/gpulab.conf"):
        raise GpulabError(
            f"{guest.name} has no proxy yet",
            "Tokens are made by the first deploy.",
            f"pyinfra INVENTORY deploy.py --limit {guest.name}",
        )
    if actions.any():
        yield applied(actions, wanted, found.get("version", ""))


def try_out(guest: Guest, cluster: str, secrets: Secrets, chosen: Sequence[Target]) -> None:
    """
    Raises:
        GpulabError: the proxy does not answer a new token as it should; the previous one is still valid.
    """
    for each in chosen:
        value = secrets.get(cluster, each.name, guest.name) or ""
        port = guest.services.served()[each.service].port
        where = f"https://{guest.address.ip}:{port}{PROBES[each.service]}"
        try:
            status = answered(guest, port, PROBES[each.service], value)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _unproven(each, f"{where}: {error}", guest) from None
        if status != 200:
            raise _unproven(each, f"{where}: HTTP {status}, expected 200", guest)


def _unproven(each: Target, said: str, guest: Guest) -> GpulabError:
    return GpulabError(
        f"The new token ({each}) could not be tried: the previous one stays valid beside it",
        said,
        "this machine must reach the proxy (`access.allow_from`), and the service must run; then run rotate.py again "
        f"--limit {guest.name}",
    )


def answered(guest: Guest, port: int, path: str, value: str) -> int:
    """The HTTP status that the proxy answers a token with, asked from this machine."""
    certificate, name = trusted(guest)
    context = ssl.create_default_context(cafile=str(certificate))
    # A given certificate is trusted itself, whoever signed it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    connection = http.client.HTTPSConnection(name, port, timeout=ANSWER_S, context=context)
    with socket.create_connection((str(guest.address.ip), port), timeout=ANSWER_S) as plain:
        connection.sock = context.wrap_socket(plain, server_hostname=name)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {value}"})
            return connection.getresponse().status
        finally:
            connection.close()
