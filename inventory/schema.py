# SPDX-License-Identifier: MIT
"""What may stand in an inventory: one pydantic model a host, with the defaults of a lab with one RTX A4000.

The models are the documentation of the inventory: each field says its unit and what it means. Keys that pyinfra
itself reads (`ssh_*`, and global arguments such as `_sudo`) stand beside ours in the same host data.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from inventory.cards import CARDS, RTX_A4000, Card
from inventory.packages import DISTRIBUTIONS, Distribution

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
PciAddress = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}$")]
PciId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{4}:[0-9a-f]{4}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][^@\s]*@sha256:[0-9a-f]{64}$")]
Checksum = Annotated[str, StringConstraints(pattern=r"^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$")]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9._/-]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
HttpUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^\s]+[^/\s]$")]
Storage = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9._-]*$")]


class Model(BaseModel):
    """Strict: an unknown key or a value of another type is an error, never a guess."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


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
    def mib(self) -> int:
        return self.count * (1024 if self.size == "1G" else 2)


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


def filled_in(value: str) -> str:
    """Refuse the zeros that inventory/lab.py ships where only its user knows the digest."""
    if value.endswith(64 * "0"):
        raise ValueError("the digest that the publisher states, in place of the zeros")
    return value


class Image(Model):
    """The cloud image that the system disk is made from."""

    url: HttpUrl
    #: `sha512:…` or `sha256:…` as the image's publisher states it; PVE checks it at the download.
    checksum: Annotated[Checksum, AfterValidator(filled_in)]
    #: Name on the node's storage. PVE imports only .qcow2, .raw, .vmdk and .ova.
    filename: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+\.(qcow2|raw|vmdk)$")]


class DataDisk(Model):
    """The disk that outlives rebuilds: models, vectors and everything else that cannot be made again."""

    size_gib: int = Field(default=200, ge=1)
    mount: AbsolutePath = "/srv/data"


class Nvidia(Model):
    """Driver and container toolkit in the guest, from NVIDIA's repositories (or a mirror of the same layout)."""

    #: R580 is NVIDIA's long-term branch until June 2028 (supported-drivers table of the driver documentation).
    branch: Annotated[str, StringConstraints(pattern=r"^[0-9]{3}$")] = "580"
    #: An exact driver version of that branch; None: the newest of the branch.
    version: Annotated[str, StringConstraints(pattern=r"^[0-9]{3}(\.[0-9]+){1,2}$")] | None = None
    repository: HttpUrl = "https://developer.download.nvidia.com/compute/cuda/repos"
    #: SHA-256 of the repository's `cuda-archive-keyring.gpg`; None: trust the HTTPS download.
    key_sha256: Sha256 | None = None
    toolkit_repository: HttpUrl = "https://nvidia.github.io/libnvidia-container"
    #: SHA-256 of the toolkit repository's `gpgkey`; None: trust the HTTPS download.
    toolkit_key_sha256: Sha256 | None = None
    #: 1.17.8 closed CVE-2025-23266; 1.18 refreshes CDI specs by itself.
    toolkit_version: Annotated[str, StringConstraints(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+-[0-9]+$")] = "1.20.0-1"
    persistence: bool = True

    @model_validator(mode="after")
    def version_and_trust(self) -> Nvidia:
        if self.version is not None and not self.version.startswith(self.branch + "."):
            raise ValueError(f"`version` of branch {self.branch}, got {self.version}")
        for url, key, digest in (
            (self.repository, "key_sha256", self.key_sha256),
            (self.toolkit_repository, "toolkit_key_sha256", self.toolkit_key_sha256),
        ):
            if url.startswith("http://") and digest is None:
                raise ValueError(f"`{key}` beside {url}: without TLS it is the only root of trust")
        return self


class Service(Model):
    """One container of ours: recreated exactly when its declaration changes."""

    #: Name and digest, `ollama/ollama@sha256:…`: a tag can change behind one's back.
    image: Annotated[Digest, AfterValidator(filled_in)]
    #: Port on the guest's loopback address.
    port: int = Field(ge=1, le=65535)
    #: Device memory this service may use, MiB. The sum over a GPU's services may not exceed its card.
    memory_budget_mib: int = Field(ge=256)
    environment: dict[Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$")], str] = {}


class Ollama(Service):
    """Ollama: its models lie on the data disk."""

    port: int = Field(default=11434, ge=1, le=65535)
    memory_budget_mib: int = Field(default=8192, ge=256)
    #: Models that must be present; absent ones are pulled.
    models: list[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/-]+(:[A-Za-z0-9._-]+)?$")]] = []


class Services(Model):
    ollama: Ollama | None = None

    def declared(self) -> dict[str, Service]:
        """The services that the guest runs, by name."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


class Guest(SshHost):
    """A GPU VM (group `guests`). `ssh_hostname` is taken from `address`."""

    name: Name
    #: The node it runs on: a name of the group `nodes`.
    node: Name
    vmid: int = Field(ge=100, le=999_999_999)
    #: Address and prefix length on the bridge, `192.0.2.101/24`.
    address: IPv4Interface
    gateway: IPv4Address
    nameserver: IPv4Address | None = None
    bridge: Storage = "vmbr0"
    ssh_user: Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_-]*$")] = "debian"
    #: The line of an OpenSSH public key file that cloud-init authorizes; None: `ssh_key` with `.pub` is read.
    ssh_public_key: str | None = None
    image: Image
    distribution: str = "debian13"
    cores: int = Field(default=8, ge=1)
    #: MiB; passthrough pins all of it on the node from the start.
    memory_mib: int = Field(default=16384, ge=512)
    disk_storage: Storage = "local-lvm"
    system_disk_gib: int = Field(default=64, ge=4)
    data_disk: DataDisk = DataDisk()
    #: The passthrough device it is given, by name; None: a guest without GPU.
    gpu: Name | None = "a4000"
    onboot: bool = True
    #: May the deploy reboot this guest, when the driver can't be reloaded?
    allow_reboot: bool = True
    #: Seconds from power on to a finished cloud-init.
    boot_timeout_s: int = Field(default=600, ge=10)
    nvidia: Nvidia = Nvidia()
    #: Registries with a CA of their own: `host:port` to a PEM file on the control machine.
    registry_ca: dict[str, str] = {}
    services: Services = Services()
    #: Check ids that are expected to be `not run` here. Empty for a lab of real hardware.
    expected_not_run: list[str] = []

    @field_validator("address", "gateway", "nameserver", mode="before")
    @classmethod
    def from_text(cls, value: Any, info: Any) -> Any:
        if not isinstance(value, str):
            return value
        if info.field_name == "address":
            if "/" not in value:
                raise ValueError("an address with its prefix length, such as 192.0.2.101/24")
            return IPv4Interface(value)
        return IPv4Address(value)

    @field_validator("distribution")
    @classmethod
    def known_distribution(cls, value: str) -> str:
        if value not in DISTRIBUTIONS:
            raise ValueError(f"one of {', '.join(sorted(DISTRIBUTIONS))}")
        return value

    @model_validator(mode="after")
    def gateway_on_link(self) -> Guest:
        if self.gateway not in self.address.network:
            raise ValueError(f"`gateway` inside {self.address.network}, got {self.gateway}")
        return self

    @property
    def packages(self) -> Distribution:
        return DISTRIBUTIONS[self.distribution]

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
