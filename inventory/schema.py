# SPDX-License-Identifier: MIT
"""What may stand in an inventory: one pydantic model a host, with the defaults of a lab with one RTX A4000.

The models are the documentation of the inventory: each field says its unit and what it means. Keys that pyinfra
itself reads (`ssh_*`, and global arguments such as `_sudo`) stand beside ours in the same host data.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from inventory.access import Access, Healing, PythonIndex
from inventory.cards import CARDS, RTX_A4000, Card
from inventory.gpu import Nvidia, Tenant
from inventory.model import AbsolutePath, HttpUrl, Model, Name, Sha256, require_trust
from inventory.packages import DISTRIBUTIONS, IMAGES, Distribution
from inventory.services import Services, filled_in

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
PciAddress = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}$")]
PciId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{4}:[0-9a-f]{4}$")]
Checksum = Annotated[str, StringConstraints(pattern=r"^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$")]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^([0-9A-Fa-f]{2}:){31}[0-9A-Fa-f]{2}$")]
Storage = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9._-]*$")]


class PassthroughDevice(Model):
    """One GPU of the node that guests may be given, known to the cluster under `name` (its resource mapping)."""

    name: Name = "a4000"
    #: Domain, bus and device; all functions of it are handed over together. None: the node's only card of that `id`.
    address: PciAddress | None = None
    #: Vendor and device id of function 0. The card table knows the ids of its other functions.
    id: PciId = RTX_A4000.functions[0]
    #: The group it must be in. None: any group that holds nothing but the device's own functions and bridges.
    iommu_group: int | None = None
    #: The reset methods that the kernel must offer for function 0, in its order. None: whatever it offers.
    reset_methods: list[Literal["device_specific", "acpi", "flr", "af_flr", "pm", "bus", "cxl_bus"]] | None = None
    #: Accept a group with other devices in it: they lose their host driver too.
    allow_shared_group: bool = False
    #: Accept the card that drives the node's boot screen: the node then has no console on it.
    allow_boot_vga: bool = False

    @field_validator("id")
    @classmethod
    def known_card(cls, value: str) -> str:
        if value not in CARDS:
            raise ValueError(f"a card of the card table ({', '.join(sorted(CARDS))})")
        return value

    @property
    def card(self) -> Card:
        return CARDS[self.id]


class Hugepages(Model):
    """Huge pages that the node's kernel sets aside at boot, for guests that use them."""

    #: Pages of 1 GiB are reliably had at boot only.
    size: Literal["2M", "1G"] = "1G"
    count: int = Field(ge=1)

    @property
    def page_mib(self) -> int:
        return 1024 if self.size == "1G" else 2

    @property
    def mib(self) -> int:
        return self.count * self.page_mib


class Passthrough(Model):
    """What the node hands to guests, and how the node boots for it. docs/hypervisor.md says what each key changes."""

    devices: list[PassthroughDevice] = Field(min_length=1)
    #: `iommu=pt`: devices that stay with the host skip translation.
    iommu_pt: bool = True
    #: Host memory in GiB that no guest may take. Passthrough pins a guest's whole memory from its start.
    headroom_gib: float = Field(default=4, ge=0)
    #: Host drivers never to be loaded for any device. Binding by address does without: it is for a host whose driver
    #: makes trouble by its mere presence. A card that stays with the host loses its driver, too.
    blacklist: list[ModuleName] = []
    #: Pretend that the named ports isolate their devices. Groups become smaller, and the isolation that a group
    #: stands for is gone: a guest may reach the other devices' memory.
    pcie_acs_override: Literal["downstream", "multifunction", "downstream,multifunction"] | None = None
    #: Start functions that the kernel leaves out. `sysfb_init`: no boot framebuffer, for a card whose memory it
    #: would occupy (`BAR n: can't reserve`); the node then has no boot console on any screen.
    initcall_blacklist: list[Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")]] = []
    #: Keep idle devices of vfio-pci out of the power state D3, for cards that do not come back from it.
    disable_idle_d3: bool = False
    #: Accept an IOMMU without interrupt remapping: a guest can then send interrupts to the host.
    allow_unsafe_interrupts: bool = False
    #: Memory set aside at boot. None: nothing, guests get ordinary pages.
    hugepages: Hugepages | None = None
    #: The kernel that the node boots (proxmox-boot-tool's pin), `6.14.8-2-pve`. None: the newest one, or the pin that
    #: somebody else set.
    kernel: Annotated[str, StringConstraints(pattern=r"^[0-9][A-Za-z0-9.+~_-]*$")] | None = None

    @model_validator(mode="after")
    def distinct(self) -> Passthrough:
        names = [device.name for device in self.devices]
        if len(names) != len(set(names)):
            raise ValueError("a different name for each device")
        for device in self.devices:
            alike = [other for other in self.devices if other.id == device.id]
            if len(alike) > 1 and device.address is None:
                raise ValueError(f"an `address` for each of the {len(alike)} devices with the id {device.id}")
        addresses = [device.address for device in self.devices if device.address]
        if len(addresses) != len(set(addresses)):
            raise ValueError("a different address for each device")
        return self


class Api(Model):
    """How the control machine reaches the PVE API."""

    #: Name or address; None: the node's `ssh_hostname`.
    host: str | None = None
    port: int = Field(default=8006, ge=1, le=65535)
    user: Annotated[str, StringConstraints(pattern=r"^[^@\s]+@(pve|pam)$")] = "gpulab@pve"
    #: PVE refuses token ids of one character.
    token_name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9._-]+$")] = "gpulab"
    role: Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9._-]+$")] = "Gpulab"
    #: Seconds until one request is given up.
    timeout_s: int = Field(default=60, ge=5)
    #: SHA-256 fingerprint of the API's certificate (`pvenode cert info`): then it alone is accepted, in place of the
    #: cluster's CA. For a certificate that somebody else has signed.
    fingerprint: Fingerprint | None = None


class SshHost(Model):
    """What pyinfra's SSH connector reads; the host's key is always checked against the lab's known_hosts."""

    ssh_hostname: str
    ssh_user: str = "root"
    ssh_port: int = Field(default=22, ge=1, le=65535)
    #: Private key file; None: the SSH agent and the default keys.
    ssh_key: str | None = None
    #: The lab's private folder on the control machine: secrets.json, known_hosts and the clusters' CA files.
    state_dir: str = "~/.config/gpulab"
    #: Empty for real hardware. A rehearsal names here what stands in for it, and every report repeats it.
    simulated: str = ""

    @property
    def state(self) -> Path:
        return Path(self.state_dir).expanduser()


class Node(SshHost):
    """A Proxmox VE host (group `nodes`)."""

    name: Name
    passthrough: Passthrough
    api: Api = Api()
    #: Nodes of one PVE cluster carry the same word here; None: a cluster of its own, named as the node.
    cluster: Name | None = None
    #: Storage that holds cloud images (content type `import`).
    image_storage: Storage = "local"
    #: Folder of that storage's snippets on the node.
    snippets_dir: AbsolutePath = "/var/lib/vz/snippets"
    #: May the deploy reboot the node when its boot configuration needs it?
    allow_reboot: bool = True
    #: Seconds a reboot may take until SSH answers again; servers with much memory need minutes.
    reboot_timeout_s: int = Field(default=600, ge=10)
    #: May the reboot cut off running guests? They are shut down in PVE's order and started again afterwards.
    allow_guest_shutdown: bool = False
    #: Seconds that each of them gets for it. One that needs longer keeps the node from rebooting.
    guest_shutdown_timeout_s: int = Field(default=180, ge=1, le=7200)

    @property
    def cluster_name(self) -> str:
        return self.cluster or self.name

    @property
    def api_host(self) -> str:
        return self.api.host or self.ssh_hostname

    @property
    def ca_file(self) -> Path:
        """Where `make bootstrap` puts the certificate of the cluster's own CA."""
        return self.state / "ca" / f"{self.cluster_name}.pem"

    def device(self, name: str) -> PassthroughDevice:
        return next(device for device in self.passthrough.devices if device.name == name)


class Image(Model):
    """The cloud image that the system disk is made from: `name` and `release`, or `url` and `filename`.

    A name stands for the publisher's address and gives every release a file of its own on the storage. The checksum
    is always the user's to give: one that is fetched beside the image says nothing that the image does not.
    """

    #: One of debian12, debian13, ubuntu2204, ubuntu2404 (inventory/packages.py). None: `url` and `filename` say it.
    name: str | None = None
    #: The publisher's release of that image: `20251117-2299` (Debian), `20251113` (Ubuntu).
    release: Annotated[str, StringConstraints(pattern=r"^[0-9]{8}(\.[0-9]+)?(-[0-9]+)?$")] | None = None
    url: HttpUrl
    #: `sha512:…` or `sha256:…` as the image's publisher states it; PVE checks it at the download.
    checksum: Annotated[Checksum, AfterValidator(filled_in)]
    #: Name on the node's storage. PVE imports only .qcow2, .raw and .vmdk: Ubuntu's `.img` is a qcow2 by another name.
    filename: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+\.(qcow2|raw|vmdk)$")]

    @model_validator(mode="before")
    @classmethod
    def named(cls, data: Any) -> Any:
        """Fill in `url` and `filename` of a named image."""
        if not isinstance(data, dict) or data.get("name") is None:
            return data
        name, release = data["name"], data.get("release")
        if not isinstance(name, str) or name not in IMAGES:
            raise ValueError(f"`name` to be one of {', '.join(sorted(IMAGES))}, got {name!r}")
        if not isinstance(release, str):
            raise ValueError(f"`release` beside `name`, such as {IMAGES[name].example}")
        for key in ("url", "filename"):
            if key in data:
                raise ValueError(f"`name` and `release`, or `url` and `filename`; got `name` and `{key}`")
        return {**data, "url": IMAGES[name].url.format(release=release), "filename": f"{name}-{release}.qcow2"}

    @model_validator(mode="after")
    def release_has_a_name(self) -> Image:
        if self.release is not None and self.name is None:
            raise ValueError("`name` beside `release`")
        return self


class DataDisk(Model):
    """The disk that outlives rebuilds: models, vectors and everything else that cannot be made again."""

    size_gib: int = Field(default=200, ge=1)
    mount: AbsolutePath = "/srv/data"
    #: Is it part of the VM's backups? False: only the system disk is, and a restore has nothing to compare.
    backup: bool = True


#: A number, `*`, a range `8..17`, each with a step behind `/`; several with commas.
_CLOCK = re.compile(
    r"(?:\*|[0-9]{1,2}(?:\.\.[0-9]{1,2})?)(?:/[0-9]{1,2})?(?:,[0-9]{1,2}(?:\.\.[0-9]{1,2})?(?:/[0-9]{1,2})?)*"
)
_DAYS = {"mon": "day", "tue": "sday", "wed": "nesday", "thu": "rsday", "fri": "day", "sat": "urday", "sun": "day"}
_DAY = "|".join(f"{short}(?:{rest})?" for short, rest in _DAYS.items())
_WEEKDAYS = re.compile(rf"(?:{_DAY})(?:\.\.(?:{_DAY}))?(?:,(?:{_DAY})(?:\.\.(?:{_DAY}))?)*", re.I)
_DATE = re.compile(r"(?:(?:\*|[0-9]{4})-)?(\*|[0-9,./]+)-(\*|[0-9,./]+)")
_WORDS = ("minutely", "hourly", "daily", "weekly", "monthly", "quarterly", "semiannually", "semi-annually")
_EVENT = "a calendar event of PVE, such as 03:00, sun 02:30, mon..fri 22:00 or */6:00"


def _clock(text: str) -> bool:
    """Is it `hours:minutes[:seconds]`, or minutes alone, each within its limit?"""
    parts = text.split(":")
    limits = {1: (59,), 2: (23, 59), 3: (23, 59, 59)}.get(len(parts), ())
    return bool(limits) and all(
        _CLOCK.fullmatch(part) is not None and all(int(number) <= limit for number in re.findall(r"[0-9]+", part))
        for part, limit in zip(parts, limits, strict=True)
    )


def _date(text: str) -> bool:
    """Is it `[year-]month-day`, each a number that there is?"""
    found = _DATE.fullmatch(text)
    return found is not None and all(
        1 <= int(number) <= limit
        for part, limit in zip(found.groups(), (12, 31), strict=True)
        for number in re.findall(r"[0-9]+", part)
    )


def _calendar_event(value: str) -> str:
    """The event in one spelling: lower case, one space between its parts."""
    words = value.lower().split()
    rest = list(words)
    if len(words) == 1 and words[0] in (*_WORDS, "yearly", "annually"):
        return words[0]
    if rest and _WEEKDAYS.fullmatch(rest[0]):
        rest.pop(0)
    if rest and _date(rest[0]):
        rest.pop(0)
    if rest and _clock(rest[0]):
        rest.pop(0)
    if rest or not words:
        raise ValueError(_EVENT)
    return " ".join(words)


class Keep(Model):
    """How many backups stay: the newest ones, and the newest of so many hours, days and so on. 0: none for that."""

    last: int = Field(default=0, ge=0)
    hourly: int = Field(default=0, ge=0)
    daily: int = Field(default=0, ge=0)
    weekly: int = Field(default=0, ge=0)
    monthly: int = Field(default=0, ge=0)
    yearly: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def something(self) -> Keep:
        if not self.options:
            raise ValueError("at least one backup to stay, such as `last`: 3")
        return self

    @property
    def options(self) -> dict[str, int]:
        """As PVE calls them: `keep-daily`."""
        return {f"keep-{name}": count for name in type(self).model_fields if (count := getattr(self, name))}


class Backup(Model):
    """Backups of a guest by PVE's own scheduler (vzdump). docs/backup.md says what they hold and how to restore."""

    #: Where they lie: a storage of the node with the content type `backup`.
    storage: Storage = "local"
    #: When: a calendar event of PVE, in the node's time zone.
    schedule: Annotated[str, AfterValidator(_calendar_event)] = "03:00"
    #: What stays. Said in part, the rest is none: {"last": 3} keeps three.
    keep: Keep = Keep(daily=7, weekly=4)
    #: `snapshot`: the guest goes on; its agent holds file systems still for a moment. `suspend` and `stop` halt it.
    mode: Literal["snapshot", "suspend", "stop"] = "snapshot"
    #: Hours; verify fails when the newest backup is older.
    max_age_h: float = Field(default=26, gt=0)
    #: The VM id that restore.py restores into, to compare the data. No guest's.
    spare_vmid: int = Field(ge=100, le=999_999_999)


class Engine(Model):
    """What runs the containers."""

    #: Podman's containers are systemd units (Quadlet). It needs Debian 13.
    kind: Literal["docker", "podman"] = "docker"
    #: Docker's own packages, for a distribution whose Docker is too old to be given a GPU (Debian 12).
    repository: HttpUrl = "https://download.docker.com/linux"
    #: SHA-256 of the key file `gpg` of that repository; None: trust the HTTPS download.
    key_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def trust(self) -> Engine:
        require_trust(self.repository, "key_sha256", self.key_sha256)
        return self


def _interface(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if "/" not in value:
        raise ValueError("an address with its prefix length, such as 192.0.2.101/24")
    return IPv4Interface(value)


def _several(value: Any) -> Any:
    return value if isinstance(value, list) else [] if value is None else [value]


Interface = Annotated[IPv4Interface, BeforeValidator(_interface)]
Router = Annotated[IPv4Address, BeforeValidator(lambda value: IPv4Address(value) if isinstance(value, str) else value)]
Server = Annotated[
    IPv4Address | IPv6Address, BeforeValidator(lambda value: ip_address(value) if isinstance(value, str) else value)
]
#: Unicast, as PVE asks for.
Mac = Annotated[str, StringConstraints(pattern=r"^[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$")]
#: CPUs or NUMA nodes: `0-7,16-23`.
Cpus = Annotated[str, StringConstraints(pattern=r"^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$")]
Domain = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$")]
#: PVE keeps tags in lower case.
Tag = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_][a-z0-9_.+-]*$")]


class Network(Model):
    """One network card (virtio) of a guest."""

    bridge: Storage = "vmbr0"
    #: VLAN tag, on a bridge that knows VLANs. None: untagged.
    vlan: int | None = Field(default=None, ge=1, le=4094)
    #: Bytes. 1: as the bridge. None: 1500.
    mtu: int | None = Field(default=None, ge=1, le=65520)
    #: None: PVE chooses one when the card is made, and it stays.
    mac: Mac | None = None
    #: Address and prefix length. None: DHCP.
    address: Interface | None = None
    #: The guest's default route; exactly one of its cards has it.
    gateway: Router | None = None

    @model_validator(mode="after")
    def gateway_on_link(self) -> Network:
        if self.gateway is None:
            return self
        if self.address is None:
            raise ValueError("`address` beside `gateway`")
        if self.gateway not in self.address.network:
            raise ValueError(f"`gateway` inside {self.address.network}, got {self.gateway}")
        return self


class NumaNode(Model):
    """One NUMA node that the guest sees."""

    #: The guest's CPUs in it, counted from 0.
    cpus: Cpus
    memory_mib: int = Field(ge=128)
    #: The node's NUMA nodes that its memory comes from. None: any.
    host_nodes: Cpus | None = None
    #: How memory is taken from `host_nodes`.
    policy: Literal["preferred", "bind", "interleave"] | None = None

    @model_validator(mode="after")
    def policy_for_host_nodes(self) -> NumaNode:
        if (self.host_nodes is None) != (self.policy is None):
            raise ValueError("`host_nodes` and `policy` together")
        return self


class Startup(Model):
    """When the guest starts with its node, among the others. It stops in the reverse order."""

    #: The lowest starts first. None: after all that have one.
    order: int | None = Field(default=None, ge=0)
    #: Seconds that PVE waits after its start before the next guest's.
    up_s: int | None = Field(default=None, ge=0)
    #: Seconds that it gets to shut down; PVE's default is 180.
    down_s: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def something(self) -> Startup:
        if self.order is None and self.up_s is None and self.down_s is None:
            raise ValueError("at least one of `order`, `up_s` and `down_s`")
        return self


class Guest(SshHost):
    """A GPU VM (group `guests`). `ssh_hostname` is taken from `address`. docs/vm.md says what each key changes."""

    name: Name
    #: The node it runs on: a name of the group `nodes`.
    node: Name
    vmid: int = Field(ge=100, le=999_999_999)
    #: Address and prefix length on the bridge, `192.0.2.101/24`. It is the one that gpulab reaches the guest at.
    address: Interface
    gateway: Router | None = None
    bridge: Storage = "vmbr0"
    #: All network cards, in place of `bridge`, `address` and `gateway`, which are the first one's then.
    networks: list[Network] = []
    #: DNS servers: one address or a list. Empty: what the node itself uses.
    nameserver: Annotated[list[Server], BeforeValidator(_several)] = []
    #: DNS search domain. None: what the node itself uses.
    searchdomain: Domain | None = None
    ssh_user: Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]*$")] = "debian"
    #: The line of an OpenSSH public key file that cloud-init authorizes; None: `ssh_key` with `.pub` is read.
    ssh_public_key: str | None = None
    image: Image
    #: What the image holds. A named image says it itself.
    distribution: str = "debian13"
    cores: int = Field(default=8, ge=1)
    #: MiB; passthrough pins all of it on the node from the start.
    memory_mib: int = Field(default=16384, ge=512)
    #: `host` hands the node's CPU through; a model of QEMU or PVE, or `custom-NAME`, otherwise.
    cpu_type: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "host"
    #: `q35` is the newest version of the machine at each start; `pc-q35-9.2+pve1` stays.
    machine: Annotated[str, StringConstraints(pattern=r"^(q35|pc-q35-[0-9]+(\.[0-9]+)+(\+pve[0-9]+)?)$")] = "q35"
    #: Does the guest see NUMA nodes? None: not declared; PVE's default is no.
    numa: bool | None = None
    #: The guest's NUMA nodes. Empty: PVE makes one a socket.
    numa_nodes: list[NumaNode] = []
    #: The node's CPUs that the guest's threads run on. Set over SSH: PVE lets no token do it.
    affinity: Cpus | None = None
    #: Huge pages under the guest's memory, which need `numa`; `any` is 1 GiB pages where they fit. Set over SSH.
    hugepages: Literal["2M", "1G", "any"] | None = None
    disk_storage: Storage = "local-lvm"
    system_disk_gib: int = Field(default=64, ge=4)
    data_disk: DataDisk = DataDisk()
    #: None: gpulab schedules no backups.
    backup: Backup | None = None
    #: The passthrough device it is given, by name; None: a guest without GPU.
    gpu: Name | None = "a4000"
    onboot: bool = True
    #: None: not declared. Set over SSH: its right sits on `/`.
    startup: Startup | None = None
    #: PVE then refuses to destroy the VM or to delete its disks.
    protection: bool = True
    #: Tags beside our own; others go.
    tags: list[Tag] = []
    #: Shown on the VM's summary in PVE's web interface. None: not declared.
    description: Annotated[str, StringConstraints(max_length=8000)] | None = None
    #: May the deploy reboot this guest for a driver that can't be reloaded?
    allow_reboot: bool = True
    #: May the deploy stop and start its VM for changes that a running one can't take?
    allow_restart: bool = True
    #: Seconds from power on to a finished cloud-init.
    boot_timeout_s: int = Field(default=600, ge=10)
    #: The id of the VM that holds the data disks while `destroy=1` makes the guest's own anew. None: the next free one.
    keeper_vmid: int | None = Field(default=None, ge=100, le=999_999_999)
    #: Days that a rebuild keeps the old system disk after a passed verify. `--data keep_old=…` is for one run.
    keep_old: int = Field(default=0, ge=0)
    nvidia: Nvidia = Nvidia()
    #: Who uses the card, and with which limits.
    tenants: list[Tenant] = []
    engine: Engine = Engine()
    #: Are security upgrades installed by themselves (unattended-upgrades)? The driver is never among them, and no
    #: kernel that it was not built for is booted.
    security_upgrades: bool = True
    #: Registries with a CA of their own: `host:port` to a PEM file on the control machine.
    registry_ca: dict[str, str] = {}
    services: Services = Services()
    #: Remove containers of ours that are no longer declared, never their data. False: the plan names them.
    prune: bool = False
    #: The proxy in front of the services, for the tenants. None: they answer on the guest's loopback address alone.
    access: Access | None = Access()
    #: None: nobody restarts a service that has lost the GPU.
    healing: Healing | None = Healing()
    #: Where pip on this guest finds packages. None: pip's own default.
    python_index: PythonIndex | None = None
    #: Check ids that are expected to be `not run` here; `benchmarks.*` is all that begin so. Empty for a lab of real
    #: hardware.
    expected_not_run: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def first_network_and_image(cls, data: Any) -> Any:
        """The first of `networks` is `bridge`, `address` and `gateway` too; a named image is a distribution."""
        if not isinstance(data, dict):
            return data
        image = data.get("image")
        name = image.get("name") if isinstance(image, dict) else getattr(image, "name", None)
        if isinstance(name, str) and name in IMAGES:
            data = {"distribution": name, **data}
        networks = data.get("networks")
        if not networks or not isinstance(networks, list):
            return data
        for key in ("bridge", "address", "gateway"):
            if data.get(key) is not None:
                raise ValueError(f"`{key}` inside `networks`, not beside it")
        first = networks[0].model_dump() if isinstance(networks[0], Network) else networks[0]
        if not isinstance(first, dict):
            return data
        if first.get("address") is None:
            raise ValueError("`address` in the first of `networks`, where gpulab reaches the guest")
        data = {**data, **{key: first[key] for key in ("bridge", "address", "gateway") if first.get(key) is not None}}
        return {"ssh_hostname": str(data["address"]).partition("/")[0], **data}

    @field_validator("distribution")
    @classmethod
    def known_distribution(cls, value: str) -> str:
        if value not in DISTRIBUTIONS:
            raise ValueError(f"one of {', '.join(sorted(DISTRIBUTIONS))}")
        return value

    @model_validator(mode="after")
    def one_way_out(self) -> Guest:
        if self.gateway is not None and self.gateway not in self.address.network:
            raise ValueError(f"`gateway` inside {self.address.network}, got {self.gateway}")
        gateways = [card.gateway for card in self.cards if card.gateway is not None]
        if len(gateways) != 1:
            raise ValueError(f"one `gateway`, the guest's default route; got {len(gateways) or 'none'}")
        macs = [card.mac.lower() for card in self.cards if card.mac is not None]
        if len(macs) != len(set(macs)):
            raise ValueError("a different `mac` for each card")
        return self

    @model_validator(mode="after")
    def memory_fits(self) -> Guest:
        if self.numa_nodes and self.numa is False:
            raise ValueError("`numa` beside `numa_nodes`")
        declared = sum(each.memory_mib for each in self.numa_nodes)
        if self.numa_nodes and declared != self.memory_mib:
            raise ValueError(f"`numa_nodes` with {self.memory_mib} MiB in all, as `memory_mib`; got {declared}")
        if self.hugepages is not None and not (self.numa or self.numa_nodes):
            raise ValueError("`numa` beside `hugepages`: PVE does not start the VM otherwise")
        page = {"2M": 2, "1G": 1024}.get(self.hugepages or "", 1)
        if any(part % page for part in (self.memory_mib, *(each.memory_mib for each in self.numa_nodes))):
            raise ValueError(f"`memory_mib` in whole huge pages of {self.hugepages}")
        return self

    @model_validator(mode="after")
    def image_of_the_distribution(self) -> Guest:
        if self.image.name not in (None, self.distribution):
            raise ValueError(f"`distribution` {self.image.name}, as the image's; got {self.distribution}")
        if self.engine.kind == "podman" and self.packages.podman is None:
            fit = ", ".join(sorted(name for name, each in DISTRIBUTIONS.items() if each.podman is not None))
            raise ValueError(f"`engine.kind` docker on {self.distribution}: its Podman is too old (newer: {fit})")
        return self

    @property
    def cards(self) -> list[Network]:
        """All network cards, net0 first."""
        return self.networks or [Network(bridge=self.bridge, address=self.address, gateway=self.gateway)]

    @property
    def engine_packages(self) -> tuple[str, ...]:
        """The packages of the declared container engine."""
        found = self.packages.podman if self.engine.kind == "podman" else self.packages.docker
        assert found is not None  # image_of_the_distribution() refused it
        return found

    @property
    def services_ca(self) -> Path:
        """The certificate of the lab's own CA, with which users check the services' proxy."""
        return self.state / "ca/services/ca.pem"

    @property
    def packages(self) -> Distribution:
        return DISTRIBUTIONS[self.distribution].of_branch(self.nvidia.branch)

    def pip_index(self) -> tuple[str, str]:
        """URL of pip's index and the PEM text of its CA; empty: pip's own.

        Raises:
            OSError: the CA's file cannot be read.
        """
        if self.python_index is None:
            return "", ""
        ca = self.python_index.ca
        return self.python_index.url, Path(ca).expanduser().read_text() if ca else ""

    def registry_certificates(self) -> dict[str, str]:
        """`registry_ca` with the PEM texts in place of the files.

        Raises:
            OSError: a file cannot be read.
        """
        return {name: Path(path).expanduser().read_text() for name, path in self.registry_ca.items()}

    def public_key(self) -> str:
        """The key that cloud-init authorizes.

        Raises:
            OSError: neither `ssh_public_key` nor a readable `ssh_key` + `.pub`.
        """
        if self.ssh_public_key is not None:
            return self.ssh_public_key.strip()
        return Path(f"{self.ssh_key}.pub").expanduser().read_text().strip()


class Lab(Model):
    """The whole lab, validated: what deploy, rebuild, verify and the tests work from."""

    nodes: dict[str, Node]
    guests: dict[str, Guest]

    def node_of(self, guest: Guest) -> Node:
        return self.nodes[guest.node]

    def guests_of(self, node: Node) -> list[Guest]:
        return [guest for guest in self.guests.values() if guest.node == node.name]

    def card_of(self, guest: Guest) -> Card | None:
        """The card that the guest is given, or None."""
        return self.node_of(guest).device(guest.gpu).card if guest.gpu else None


#: Names of host data that are pyinfra's own: connector settings and global arguments.
PYINFRA_KEY = re.compile(r"^(ssh_[a-z_]+|_[a-z_]+|fake_[a-z_]+)$")
