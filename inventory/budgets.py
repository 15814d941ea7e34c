# SPDX-License-Identifier: MIT
"""Who may use how much of a card's memory, and what that comes to as each service's own setting: here and nowhere else.

A budget holds all that its processes take: weights and data, and what CUDA takes for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from inventory.cards import Card

if TYPE_CHECKING:
    from inventory.schema import Guest

#: MiB that a CUDA process takes beside what it allocates: context and libraries. 0.5 GB is what is commonly seen; no
#: source gives it for the A4000.
CONTEXT_MIB = 512

#: Processes of one job at most: more of them on one card do not compute faster.
MOST_WORKERS = 8

MIB = 1 << 20


@dataclass(frozen=True)
class Budget:
    """A share of the card: the inventory's key that declares it, and MiB."""

    key: str
    memory_mib: int


def budgets(guest: Guest) -> list[Budget]:
    """The shares of the guest's card. A tenant without `memory_limit_mib` has none, and runs no jobs."""
    services = [Budget(f"services.{name}", each.memory_budget_mib) for name, each in guest.services.served().items()]
    tenants = [
        Budget(f"tenants.{tenant.name}", tenant.memory_limit_mib)
        for tenant in guest.tenants
        if tenant.memory_limit_mib is not None
    ]
    return [*services, *tenants]


def problems(guest: Guest, card: Card) -> list[str]:
    """Shares that the card, or MPS, does not have: lines of the inventory's errors."""
    shares = budgets(guest)
    total = sum(share.memory_mib for share in shares)
    found = []
    if total > card.memory_mib:
        terms = " + ".join(f"{share.key} {share.memory_mib}" for share in shares)
        found.append(f"memory budgets: {terms} = {total} MiB; expected at most {card.memory_mib} MiB ({card.name})")
    most = guest.nvidia.mps.pinned_memory_limit_mib
    if guest.nvidia.sharing == "mps" and most is not None:
        found += [
            f"services.{name}.memory_budget_mib = {each.memory_budget_mib}: expected at most {most}, the value of "
            "nvidia.mps.pinned_memory_limit_mib, which a client can only lower"
            for name, each in guest.services.served().items()
            if each.memory_budget_mib > most
        ]
    milvus = guest.services.milvus
    if milvus is not None and milvus.pool_init_mib > (pool := milvus_pool_mib(milvus.memory_budget_mib)):
        found.append(
            f"services.milvus.pool_init_mib = {milvus.pool_init_mib}: expected at most {pool}, what "
            f"memory_budget_mib leaves beside CUDA's own {CONTEXT_MIB} MiB"
        )
    return found


def ollama_overhead_bytes(budget_mib: int, card_mib: int) -> int:
    """OLLAMA_GPU_OVERHEAD: bytes that Ollama leaves to the others."""
    return (card_mib - budget_mib) * MIB


def milvus_pool_mib(budget_mib: int) -> int:
    """Milvus' `gpu.maxMemSize`, MiB."""
    return budget_mib - CONTEXT_MIB


def torch_memory_fraction(budget_mib: int, card_mib: int, workers: int = 1) -> float:
    """`torch.cuda.set_per_process_memory_fraction` of each of a job's workers; 0 when its share holds no context."""
    return max(0.0, (budget_mib / workers - CONTEXT_MIB) / card_mib)


def pinned_limit(budget_mib: int, processes: int = 1) -> str:
    """CUDA_MPS_PINNED_DEVICE_MEM_LIMIT of each of so many processes: MPS limits a process, not a group."""
    return f"0={budget_mib // processes}M"


def torch_shares(budget_mib: int | None, card_mib: int) -> list[dict[str, float | str]] | None:
    """What each process of a job gets, for one process, two, …, as long as there is something left to compute with.

    `fraction` is torch's, `pinned` MPS'. None: a tenant without a budget, which runs no jobs.
    """
    if budget_mib is None:
        return None
    most = max(1, budget_mib // (2 * CONTEXT_MIB))
    return [
        {
            "fraction": round(torch_memory_fraction(budget_mib, card_mib, workers), 6),
            "pinned": pinned_limit(budget_mib, workers),
        }
        for workers in range(1, min(most, MOST_WORKERS) + 1)
    ]
