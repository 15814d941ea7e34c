# SPDX-License-Identifier: MIT
"""`python -m inventory.tokens INVENTORY GUEST TENANT`: what a tenant needs to use a guest's services.

The only command that prints tokens. They come from the lab's secrets; a deploy has made them.
"""

from __future__ import annotations

import argparse
import sys

from pyinfra.api.exceptions import PyinfraError

import inventory
from inventory import GpulabError, Guest, Lab
from inventory.access import BY_TOKEN, milvus_login, tenants_of, token
from inventory.secrets import Secrets


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: printed. 1: no such guest or tenant, or it has no tokens yet."""
    parser = argparse.ArgumentParser(prog="python -m inventory.tokens", description=__doc__)
    for name in ("inventory", "guest", "tenant"):
        parser.add_argument(name)
    options = parser.parse_args(arguments)
    try:
        lab = inventory.load(options.inventory)
        for line in lines(lab, _guest(lab, options.guest), options.tenant):
            print(line)
    except PyinfraError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _guest(lab: Lab, name: str) -> Guest:
    if name not in lab.guests:
        raise GpulabError(f"{name}: no such guest", f"The inventory has {', '.join(lab.guests) or 'none'}.")
    return lab.guests[name]


def lines(lab: Lab, guest: Guest, tenant: str) -> list[str]:
    """One line a service: its name, where it answers, and the token.

    Raises:
        GpulabError: no such tenant, or a token that no deploy has made yet.
    """
    if tenant not in [each.name for each in guest.tenants]:
        known = ", ".join(each.name for each in guest.tenants) or "none"
        raise GpulabError(f"{tenant}: no tenant of {guest.name}", f"It has {known}.")
    if guest.access is None:
        raise GpulabError(f"{guest.name} has no `access`: its services answer on its loopback address alone")
    found = []
    secrets, cluster = Secrets(guest.state), lab.node_of(guest).cluster_name
    for service, each in guest.services.served().items():
        if tenant not in tenants_of(guest, service):
            continue
        secret = secrets.get(cluster, token(service, tenant), guest.name)
        if secret is None:
            raise GpulabError(
                f"{tenant} has no token of {service} on {guest.name} yet",
                resolution=f"pyinfra INVENTORY deploy.py --limit {guest.name}",
            )
        shown = secret if service in BY_TOKEN else milvus_login(tenant, secret)
        found.append(f"{service}\thttps://{guest.address.ip}:{each.port}\t{shown}")
    if guest.access.certificate is None:
        found.append(f"ca\t{guest.services_ca}")
    return found


if __name__ == "__main__":
    sys.exit(main())
