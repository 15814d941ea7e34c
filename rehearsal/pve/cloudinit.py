# SPDX-License-Identifier: MIT
"""The cloud-init data that PVE generates from a VM's configuration (NoCloud: network format version 1)."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import urllib.parse
from collections.abc import Mapping

from rehearsal.pve.state import ConfigValue
from rehearsal.pve.vmconfig import parse_properties


def user_data(vmid: int, config: Mapping[str, ConfigValue]) -> str:
    """The `user-data` file."""
    hostname = str(config.get("name", f"VM{vmid}"))
    domain = str(config.get("searchdomain", ""))
    short = hostname.partition(".")[0]
    fqdn = hostname if "." in hostname or not domain else f"{hostname}.{domain}"
    lines = ["#cloud-config", f"hostname: {short}", "manage_etc_hosts: true", f"fqdn: {fqdn}"]
    if "ciuser" in config:
        lines.append(f"user: {config['ciuser']}")
    keys = [key for key in urllib.parse.unquote(str(config.get("sshkeys", ""))).splitlines() if key.strip()]
    if keys:
        lines += ["ssh_authorized_keys:", *(f"  - {key.strip()}" for key in keys)]
    upgrade = str(config.get("ciupgrade", 1)) == "1"
    lines += ["chpasswd:", "  expire: False", "users:", "  - default", f"package_upgrade: {str(upgrade).lower()}"]
    return "\n".join(lines) + "\n"


def network_config(config: Mapping[str, ConfigValue], interface: str = "") -> str:
    """The `network-config` file; with `interface` every NIC but the first is left out and it gets that name.

    A container's NIC has neither PVE's name nor its MAC, so the lab asks for `host0` and no address to match.
    """
    lines = ["version: 1", "config:"]
    nics = sorted((key for key in config if re.fullmatch(r"net\d+", key)), key=lambda key: int(key[3:]))
    for index, nic in enumerate(nics[:1] if interface else nics):
        lines += ["    - type: physical", f"      name: {interface or f'eth{index}'}"]
        if not interface:
            lines.append(f"      mac_address: '{mac_of(str(config[nic])).lower()}'")
        lines += ["      subnets:", *_subnets(str(config.get(f"ipconfig{nic[3:]}", "ip=dhcp")))]
    servers = str(config.get("nameserver", "")).replace(",", " ").split()
    if servers:
        lines += ["    - type: nameserver", "      address:", *(f"      - '{server}'" for server in servers)]
        if "searchdomain" in config:
            lines += ["      search:", f"      - '{config['searchdomain']}'"]
    return "\n".join(lines) + "\n"


def meta_data(vmid: int, config: Mapping[str, ConfigValue]) -> str:
    """The `meta-data` file: a new instance-id whenever user or network data change, and only then."""
    text = user_data(vmid, config) + network_config(config)
    return f"instance-id: {hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()}\n"


def address_of(config: Mapping[str, ConfigValue]) -> tuple[str, str]:
    """(address with prefix length, gateway) of the first NIC; empty where it is not static."""
    options = parse_properties(str(config.get("ipconfig0", "")))
    address = options.get("ip", "")
    return ("", "") if address in ("dhcp", "manual") else (address, options.get("gw", ""))


def mac_of(net: str) -> str:
    """The MAC in a stored netN, e.g. `virtio=BC:24:11:…,bridge=vmbr0`."""
    return net.partition(",")[0].partition("=")[2]


def _subnets(ipconfig: str) -> list[str]:
    options = parse_properties(ipconfig)
    address = options.get("ip", "dhcp")
    if address == "dhcp":
        return ["      - type: dhcp4"]
    interface = ipaddress.ip_interface(address)
    lines = ["      - type: static", f"        address: '{interface.ip}'", f"        netmask: '{interface.netmask}'"]
    return [*lines, f"        gateway: '{options['gw']}'"] if "gw" in options else lines
