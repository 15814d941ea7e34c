# SPDX-License-Identifier: MIT
"""The lab's network on the control machine: one bridge, address translation to the outside, and the way back."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from inventory import GpulabError

DEFAULT_SUBNET = "10.66.0.0/24"
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
#: The value of ip_forward before the first lab of this machine came up. It is shared by all labs and gone after a
#: reboot, as is the setting.
SAVED_FORWARD = Path("/run/gpulab/ip_forward")
PREFIX = "gpulab"


@dataclass(frozen=True)
class Network:
    """The subnet of a lab and the names derived from it."""

    subnet: IPv4Network

    @property
    def bridge(self) -> str:
        """Name of the bridge, and of the nftables table; two octets of the subnet tell two labs apart."""
        _, second, third, _ = self.subnet.network_address.packed
        return f"{PREFIX}{second}-{third}"

    @property
    def mac(self) -> str:
        """Hardware address of the bridge, of the range for local use."""
        return "02:67:" + ":".join(f"{octet:02x}" for octet in self.subnet.network_address.packed)

    @property
    def gateway(self) -> str:
        """The control machine's address on the bridge."""
        return self.address(1)

    def address(self, number: int) -> str:
        """The address of that number in the subnet."""
        return str(self.subnet.network_address + number)

    @property
    def resolvers(self) -> list[str]:
        """Name servers that the hosts of the lab can reach."""
        return resolvers()


def current() -> Network:
    """The network that `$GPULAB_SUBNET` chooses.

    Raises:
        GpulabError: it is not an IPv4 network of 256 addresses.
    """
    text = os.environ.get("GPULAB_SUBNET", DEFAULT_SUBNET)
    try:
        subnet = IPv4Network(text)
    except ValueError as error:
        raise GpulabError(f"GPULAB_SUBNET={text}: {error}", resolution=f"for example {DEFAULT_SUBNET}") from None
    if subnet.prefixlen != 24:
        raise GpulabError(f"GPULAB_SUBNET={text}: expected a /24 network", resolution=f"for example {DEFAULT_SUBNET}")
    return Network(subnet)


def resolvers(candidates: tuple[str, ...] = ("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")) -> list[str]:
    """The control machine's IPv4 name servers. A stub on the loopback address is of no use to another host, so the
    servers behind it (systemd-resolved's second file) are taken then.

    Raises:
        GpulabError: there is none.
    """
    for path in candidates:
        try:
            lines = Path(path).read_text().splitlines()
        except FileNotFoundError:
            continue
        words = [line.split() for line in lines]
        found = [word[1] for word in words if len(word) > 1 and word[0] == "nameserver" and _reachable(word[1])]
        if found:
            return found
    raise GpulabError(
        "No name server for the lab's hosts",
        f"{' and '.join(candidates)} name none that another host can reach.",
        "a resolver on the loopback address serves the control machine alone; add a real one to /etc/resolv.conf",
    )


def _reachable(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.version == 4 and not address.is_loopback


def is_up(network: Network) -> bool:
    """Is there a bridge of that name?"""
    return Path("/sys/class/net", network.bridge).exists()


def up(network: Network) -> list[str]:
    """Make the bridge, the forwarding and the address translation; what exists is left.

    Returns:
        Warnings: what else on this machine keeps the lab's packets back.

    Raises:
        GpulabError: the subnet is in use by something else.
    """
    _check_free(network)
    if not is_up(network):
        # Without an address of its own a bridge takes the lowest of its ports', and changes it as hosts come and go:
        # the others would then talk to an address that is gone, for ten seconds and more.
        kind = ("type", "bridge", "forward_delay", "0")
        _run("ip", "link", "add", network.bridge, "address", network.mac, *kind)
    _run("ip", "address", "replace", f"{network.gateway}/{network.subnet.prefixlen}", "dev", network.bridge)
    _run("ip", "link", "set", network.bridge, "up")
    previous = FORWARD.read_text().strip()
    if not SAVED_FORWARD.exists():
        SAVED_FORWARD.parent.mkdir(parents=True, exist_ok=True)
        SAVED_FORWARD.write_text(previous)
    if previous != "1":
        FORWARD.write_text("1")
    _run("nft", "-f", "-", stdin=ruleset(network))
    _open_iptables(network)
    return _foreign_drops()


def down(network: Network) -> list[str]:
    """Undo `up`, whatever of it is there; returns what was removed."""
    removed = []
    if network.bridge in _tables():
        _run("nft", "delete", "table", "inet", network.bridge)
        removed.append(f"nftables table {network.bridge}")
    removed += _close_iptables(network)
    if is_up(network):
        _run("ip", "link", "delete", network.bridge)
        removed.append(f"bridge {network.bridge}")
    # The last lab of the machine restores the setting: another one still needs it.
    if SAVED_FORWARD.exists() and not any(table.startswith(PREFIX) for table in _tables()):
        FORWARD.write_text(SAVED_FORWARD.read_text())
        SAVED_FORWARD.unlink()
    return removed


def ruleset(network: Network) -> str:
    """The nftables table of the lab. It is replaced as a whole: the first line makes sure there is one to delete."""
    subnet, bridge = network.subnet, network.bridge
    return f"""\
table inet {bridge} {{}}
delete table inet {bridge}
table inet {bridge} {{
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {subnet} ip daddr != {subnet} masquerade
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "{bridge}" accept
        oifname "{bridge}" accept
    }}
}}
"""


def _check_free(network: Network) -> None:
    routes = json.loads(_run("ip", "-json", "-4", "route", "show") or "[]")
    for route in routes:
        if route.get("dst") in (None, "default") or route.get("dev") == network.bridge:
            continue
        if IPv4Network(route["dst"]).overlaps(network.subnet):
            raise GpulabError(
                f"{network.subnet} is in use: {route['dst']} is reached through {route.get('dev', 'another gateway')}",
                resolution="choose another subnet: GPULAB_SUBNET=10.67.0.0/24, and the same in inventory/rehearsal.py",
            )


def _open_iptables(network: Network) -> None:
    """An `accept` in our table does not undo a `drop` elsewhere: where iptables drops (a Docker host does), let the
    bridge through there too."""
    if shutil.which("iptables") is None:
        return
    for chain in ("FORWARD", "INPUT"):
        rules = _run("iptables", "-S", chain).splitlines()
        if f"-P {chain} DROP" not in rules and not any(" DROP" in rule or " REJECT" in rule for rule in rules):
            continue
        for rule in _iptables_rules(network, chain):
            if " ".join(["-A", chain, *rule]) not in rules:
                _run("iptables", "-I", chain, *rule)


def _close_iptables(network: Network) -> list[str]:
    if shutil.which("iptables") is None:
        return []
    removed = []
    for chain in ("FORWARD", "INPUT"):
        present = _run("iptables", "-S", chain).splitlines()
        for rule in _iptables_rules(network, chain):
            if " ".join(["-A", chain, *rule]) in present:
                _run("iptables", "-D", chain, *rule)
                removed.append(f"iptables rule {chain} {' '.join(rule)}")
    return removed


def _iptables_rules(network: Network, chain: str) -> list[list[str]]:
    rules = [["-i", network.bridge, "-j", "ACCEPT"]]
    if chain == "FORWARD":
        rules.append(["-o", network.bridge, "-j", "ACCEPT"])
    return rules


def _foreign_drops() -> list[str]:
    """nftables chains of others that drop what nobody accepted: theirs to change, so they are only named."""
    listing = json.loads(_run("nft", "-j", "list", "chains"))
    chains = [item["chain"] for item in listing["nftables"] if "chain" in item]
    return [
        f"nftables chain {chain['family']} {chain['table']} {chain['name']} drops by default; "
        "let the lab's bridge through there if its hosts cannot reach the outside"
        for chain in chains
        if chain.get("hook") in ("forward", "input")
        and chain.get("policy") == "drop"
        # iptables' own chains have been opened above.
        and not (chain["name"] in ("FORWARD", "INPUT") and shutil.which("iptables"))
    ]


def _tables() -> list[str]:
    listing = json.loads(_run("nft", "-j", "list", "tables"))
    return [item["table"]["name"] for item in listing["nftables"] if "table" in item]


def _run(*argv: str, stdin: str | None = None) -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise GpulabError(f"`{' '.join(argv)}` ended with {done.returncode}", done.stderr.strip())
    return done.stdout
