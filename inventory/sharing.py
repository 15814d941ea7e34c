# SPDX-License-Identifier: MIT
"""How a process becomes a client of the GPU: the user id, environment, mounts and IPC that the sharing mode asks for.

The one place that says so: deploy gives it to containers and writes it into each tenant's profile, verify looks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from inventory import budgets
from inventory.gpu import Tenant

if TYPE_CHECKING:
    from inventory.schema import Guest

#: User and group of every client with MPS, and of the daemon itself.
SERVICE_USER = "gpulab-gpu"
#: MPS' sockets. Closed to every other user: one of them is refused at once, where MPS would let it wait for ever.
PIPE_DIRECTORY = "/run/nvidia-mps"
LOG_DIRECTORY = "/var/log/nvidia-mps"
#: One environment file a tenant, `NAME.env`.
TENANTS = "/etc/gpulab/tenants"

#: CUDA_MPS_CLIENT_PRIORITY (MPS documentation).
_PRIORITY = {"normal": "0", "below-normal": "1"}


@dataclass(frozen=True)
class Client:
    """What a container, or a shell, needs to use the GPU. All empty where the mode asks for nothing."""

    environment: Mapping[str, str] = field(default_factory=dict)
    #: Folder of the guest to path in the container.
    mounts: Mapping[str, str] = field(default_factory=dict)
    #: `uid:gid`; empty: any.
    user: str = ""
    #: The container's IPC namespace (`host`); empty: its own.
    ipc: str = ""


def client(guest: Guest, tenant: Tenant | None = None, budget_mib: int | None = None, processes: int = 1) -> Client:
    """What a process of `tenant` needs on this guest; None: one of no tenant, with MPS' own limits.

    `budget_mib`: device memory of a service that has a budget of its own, shared by so many `processes`.
    """
    if guest.nvidia.sharing != "mps":
        return Client()
    environment = {"CUDA_MPS_PIPE_DIRECTORY": PIPE_DIRECTORY, "CUDA_MPS_LOG_DIRECTORY": LOG_DIRECTORY}
    if tenant is not None:
        environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(tenant.active_thread_percentage)
        environment["CUDA_MPS_CLIENT_PRIORITY"] = _PRIORITY[tenant.priority]
        budget_mib = tenant.memory_limit_mib if budget_mib is None else budget_mib
    if budget_mib is not None:
        environment["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = budgets.pinned_limit(budget_mib, processes)
    uid = guest.nvidia.service_uid
    return Client(environment, {PIPE_DIRECTORY: PIPE_DIRECTORY}, f"{uid}:{uid}", "host")
