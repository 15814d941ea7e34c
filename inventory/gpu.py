# SPDX-License-Identifier: MIT
"""The GPU part of a guest's inventory: driver, toolkits, what the card is set to, and how it is shared.

docs/nvidia.md says what each key changes on the guest.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from inventory.cards import Card
from inventory.model import HttpUrl, Model, Name, Sha256, require_trust
from inventory.packages import BRANCH_CUDA, CUDA_LEAST_BRANCH

#: The lowest release without a known hole: CVE-2025-23266 was closed in 1.17.8.
SAFE_TOOLKIT = (1, 17, 8)


class Clocks(Model):
    """The range that the graphics clock is locked to, MHz. Equal bounds fix it."""

    min_mhz: int = Field(ge=1)
    max_mhz: int = Field(ge=1)

    @model_validator(mode="after")
    def in_order(self) -> Clocks:
        if self.min_mhz > self.max_mhz:
            raise ValueError(f"`min_mhz` at most `max_mhz`, got {self.min_mhz} and {self.max_mhz}")
        return self


class Thermal(Model):
    """What is done about a card that gets hot. Each action is logged in the guest's journal."""

    #: Degrees Celsius at which a warning is logged.
    warning_c: int = Field(default=83, ge=40, le=110)
    #: Degrees Celsius at which `action` is taken. The card itself slows down some degrees above.
    critical_c: int = Field(default=90, ge=40, le=110)
    #: `lower-power`: the power limit goes down by `step_w` at each look, not below the card's own minimum.
    action: Literal["lower-power", "log"] = "lower-power"
    step_w: int = Field(default=10, ge=1, le=100)
    #: The limit goes up again, step by step, once the card is this many degrees below `warning_c`.
    hysteresis_c: int = Field(default=5, ge=1, le=40)
    #: Seconds between two looks.
    interval_s: int = Field(default=15, ge=1, le=300)

    @model_validator(mode="after")
    def in_order(self) -> Thermal:
        if self.warning_c >= self.critical_c:
            raise ValueError(f"`warning_c` below `critical_c`, got {self.warning_c} and {self.critical_c}")
        return self


class Mps(Model):
    """The limits that every client of MPS has unless its tenant has lower ones."""

    #: Share of the card's SMs that a client may occupy, percent.
    active_thread_percentage: int = Field(default=100, ge=1, le=100)
    #: Device memory that one client process may pin, MiB. None: the whole card.
    pinned_memory_limit_mib: int | None = Field(default=None, ge=256)


class Tenant(Model):
    """A group of users: what it may take of the card, and which services it may use."""

    name: Name
    active_thread_percentage: int = Field(default=100, ge=1, le=100)
    #: MiB of device memory: its share of the card (inventory/budgets.py). MPS limits each process, so `gpulab-run`
    #: divides it among those of a job. None: no share, hence no jobs; `mps.pinned_memory_limit_mib` limits others.
    memory_limit_mib: int | None = Field(default=None, ge=256)
    #: `below-normal` gives way to the others' kernels.
    priority: Literal["normal", "below-normal"] = "normal"
    #: The services that it may use. None: all that the guest runs.
    services: list[Literal["ollama", "milvus", "pytorch"]] | None = None

    def may_use(self, service: str) -> bool:
        return self.services is None or service in self.services


class Nvidia(Model):
    """Driver and container toolkit in the guest, from NVIDIA's repositories (or a mirror of the same layout)."""

    #: R580 is NVIDIA's long-term branch until June 2028 (supported-drivers table of the driver documentation).
    branch: Annotated[str, StringConstraints(pattern=r"^[0-9]{3}$")] = "580"
    #: An exact driver version of that branch; None: the newest of the branch when it is first installed. Changing
    #: `branch` or `version` is the upgrade, and changing it back the rollback.
    version: Annotated[str, StringConstraints(pattern=r"^[0-9]{3}(\.[0-9]+){1,2}$")] | None = None
    repository: HttpUrl = "https://developer.download.nvidia.com/compute/cuda/repos"
    #: SHA-256 of the repository's `cuda-archive-keyring.gpg`; None: trust the HTTPS download.
    key_sha256: Sha256 | None = None
    toolkit_repository: HttpUrl = "https://nvidia.github.io/libnvidia-container"
    #: SHA-256 of the toolkit repository's `gpgkey`; None: trust the HTTPS download.
    toolkit_key_sha256: Sha256 | None = None
    #: 1.17.8 closed CVE-2025-23266; 1.18 refreshes CDI specs by itself.
    toolkit_version: Annotated[str, StringConstraints(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+-[0-9]+$")] = "1.20.0-1"
    #: CUDA toolkits (compilers and libraries) on the guest itself, `12.9`; several stand side by side. Containers
    #: bring their own.
    cuda: list[Annotated[str, StringConstraints(pattern=r"^[0-9]{2}\.[0-9]$")]] = []
    #: Take a toolkit that is newer than the driver's own CUDA, of the same major version: its programs run, but PTX
    #: that it makes is refused by the driver (CUDA_ERROR_UNSUPPORTED_PTX_VERSION).
    cuda_minor_compatibility: bool = False
    #: Keep the driver initialised without a client: limits and modes are lost otherwise when the last one leaves.
    persistence: bool = True
    #: Record memory and time of each process, for accounting.
    accounting: bool = True
    #: Watts. None: the card's own default.
    power_limit_w: int | None = Field(default=None, ge=1)
    #: None: the clocks are the card's own affair.
    clocks: Clocks | None = None
    #: ECC costs some memory, and a change takes a reboot of the guest. None: left as it is.
    ecc: bool | None = None
    #: None: nobody watches the temperature but the card itself.
    thermal: Thermal | None = Thermal()
    #: How several processes share the card. `mps`: at the same time, with limits, one user id, without fault
    #: isolation. `time-slice`: in turn, each with all of the card and without limits. `exclusive`: one at a time.
    sharing: Literal["mps", "time-slice", "exclusive"] = "mps"
    mps: Mps = Mps()
    #: The user id that every client runs as with `sharing = "mps"`: an MPS server serves one.
    service_uid: int = Field(default=850, ge=100, le=59999)

    @field_validator("sharing", mode="before")
    @classmethod
    def no_mig(cls, value: Any) -> Any:
        if isinstance(value, str) and value.lower() == "mig":
            raise ValueError("mps, time-slice or exclusive: no card of the card table has MIG (the RTX A4000 has none)")
        return value

    @field_validator("toolkit_version")
    @classmethod
    def safe_toolkit(cls, value: str) -> str:
        if tuple(map(int, value.partition("-")[0].split("."))) < SAFE_TOOLKIT:
            least = ".".join(map(str, SAFE_TOOLKIT))
            raise ValueError(f"at least {least}: older ones let a container out (CVE-2025-23266)")
        return value

    @model_validator(mode="after")
    def version_and_trust(self) -> Nvidia:
        if self.version is not None and not self.version.startswith(self.branch + "."):
            raise ValueError(f"`version` of branch {self.branch}, got {self.version}")
        require_trust(self.repository, "key_sha256", self.key_sha256)
        require_trust(self.toolkit_repository, "toolkit_key_sha256", self.toolkit_key_sha256)
        return self

    @model_validator(mode="after")
    def settings_that_last(self) -> Nvidia:
        if not self.persistence and (lost := self.forgotten()):
            what = f"none of what the driver forgets when the card's last client leaves: {', '.join(lost)}"
            raise ValueError(f"`persistence`, or {what}")
        return self

    @model_validator(mode="after")
    def toolkits_that_the_driver_runs(self) -> Nvidia:
        if len(self.cuda) != len(set(self.cuda)):
            raise ValueError("each toolkit of `cuda` once")
        for toolkit in self.cuda:
            if reason := too_new(toolkit, self.branch, self.cuda_minor_compatibility):
                raise ValueError(reason)
        return self

    def forgotten(self) -> list[str]:
        """What is declared, by default too, that the driver keeps only as long as it has a client."""
        kept = {
            "accounting": self.accounting,
            "power_limit_w": self.power_limit_w is not None,
            "clocks": self.clocks is not None,
            'thermal.action = "lower-power"': self.thermal is not None and self.thermal.action == "lower-power",
            # The compute mode is lost, and with MPS the server that keeps its limits.
            f'sharing = "{self.sharing}"': self.sharing != "time-slice",
        }
        return [key for key, declared in kept.items() if declared]

    def packages_of_cuda(self) -> list[str]:
        """`cuda-toolkit-12-9` and so on, never `cuda`, which would bring a driver."""
        return [f"cuda-toolkit-{toolkit.replace('.', '-')}" for toolkit in self.cuda]

    def beyond(self, card: Card) -> list[str]:
        """What is asked of the card that it cannot do: `key = value: expected …`."""
        problems = []
        if self.power_limit_w is not None and card.power_limit_w is not None:
            low, high = card.power_limit_w
            if not low <= self.power_limit_w <= high:
                problems.append(f"power_limit_w = {self.power_limit_w}: expected {low} to {high} W")
        if self.clocks is not None and card.graphics_clock_mhz is not None:
            low, high = card.graphics_clock_mhz
            for key in ("min_mhz", "max_mhz"):
                if not low <= (value := getattr(self.clocks, key)) <= high:
                    problems.append(f"clocks.{key} = {value}: expected {low} to {high} MHz")
        if self.ecc and not card.ecc:
            problems.append("ecc = True: expected False: it has none")
        limit = self.mps.pinned_memory_limit_mib
        if limit is not None and limit > card.memory_mib:
            problems.append(f"mps.pinned_memory_limit_mib = {limit}: expected at most its {card.memory_mib} MiB")
        return [f"nvidia.{problem} (the {card.name})" for problem in problems]


def too_new(toolkit: str, branch: str, minor_compatibility: bool) -> str:
    """Why a toolkit does not go with a driver branch, empty when it does."""
    wanted = tuple(map(int, toolkit.split(".")))
    own = BRANCH_CUDA.get(branch)
    if own is not None and wanted <= own:
        return ""
    least = CUDA_LEAST_BRANCH.get(wanted[0])
    if least is not None and int(branch) >= least and (minor_compatibility or own is None):
        return ""
    fitting = [name for name, cuda in sorted(BRANCH_CUDA.items()) if wanted <= cuda]
    newest = f"a toolkit up to {own[0]}.{own[1]}" if own else "an older toolkit"
    other = f", or branch {fitting[0]}" if fitting else ""
    hint = ", or `cuda_minor_compatibility`" if least is not None and int(branch) >= least else ""
    return f"{newest} with driver branch {branch}{other}{hint}; got cuda {toolkit}"


def tenant_problems(tenants: list[Tenant], nvidia: Nvidia, card: Card) -> list[str]:
    """Limits of tenants that MPS would not keep: a client can only lower what the server allows."""
    problems = []
    names = [tenant.name for tenant in tenants]
    for number, tenant in enumerate(tenants):
        if names.index(tenant.name) != number:
            problems.append(f"tenants.{number}.name = {tenant.name!r}: expected a different name for each tenant")
        most = nvidia.mps.active_thread_percentage
        if tenant.active_thread_percentage > most and nvidia.sharing == "mps":
            problems.append(
                f"tenants.{number}.active_thread_percentage = {tenant.active_thread_percentage}: expected at most "
                f"{most}, the value of nvidia.mps, which a client can only lower"
            )
        limit = nvidia.mps.pinned_memory_limit_mib or card.memory_mib
        if tenant.memory_limit_mib is not None and tenant.memory_limit_mib > limit:
            whose = (
                "the value of nvidia.mps" if nvidia.mps.pinned_memory_limit_mib else f"the memory of the {card.name}"
            )
            problems.append(
                f"tenants.{number}.memory_limit_mib = {tenant.memory_limit_mib}: expected at most {limit}, {whose}"
            )
    return problems
