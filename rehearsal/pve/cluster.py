# SPDX-License-Identifier: MIT
"""The node itself, its tasks, and the cluster's view of them: the VMs of all its nodes, the figures of this one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from rehearsal.pve import access, tasks
from rehearsal.pve.errors import bad_parameters, die, no_permission
from rehearsal.pve.power import Power
from rehearsal.pve.qemu import QemuApi
from rehearsal.pve.routing import Call, Route, needs
from rehearsal.pve.running import RunningApi
from rehearsal.pve.state import MIB, Store, Task
from rehearsal.pve.storage import StorageApi

_FIRST_VMID = 100
KERNEL = "6.14.8-2-pve"


class ClusterApi:
    """/version, /nodes, /cluster, and the tasks of the node."""

    def __init__(
        self,
        store: Store,
        workers: tasks.Tasks,
        storage: StorageApi,
        qemu: QemuApi,
        running: RunningApi,
        power: Power,
        certificate: Path,
    ) -> None:
        self._store = store
        self._tasks = workers
        self._storage = storage
        self._qemu = qemu
        self._running = running
        self._power = power
        self._certificate = certificate
        self._since = time.time()

    def routes(self) -> list[Route]:
        node = "/nodes/{node}"
        one = node + "/tasks/{upid}"
        return [
            Route("GET", "/version", self._version),
            Route("GET", "/nodes", self._nodes),
            Route("GET", "/cluster/resources", self._resources),
            Route("GET", "/cluster/status", self._cluster_status, needs("/", "Sys.Audit")),
            Route("GET", "/cluster/nextid", self._next_id),
            Route("GET", node + "/status", self._status, needs(node, "Sys.Audit")),
            Route("POST", node + "/status", self._node_power, needs(node, "Sys.PowerMgmt")),
            Route("GET", node + "/version", self._version),
            Route("GET", node + "/certificates/info", self._certificates),
            Route("GET", node + "/tasks", self._list),
            Route("GET", one + "/status", self._task_status),
            Route("GET", one + "/log", self._task_log),
            Route("DELETE", one, self._abort),
        ]

    def _version(self, call: Call) -> dict[str, Any]:
        release = self._store.state.release
        # The id of the commit a package was built from; nothing was built here.
        return {"version": release, "release": ".".join(release.split(".")[:2]), "repoid": "0000000000000000"}

    def _figures(self) -> dict[str, Any]:
        state = self._store.state
        free = self._running.free_memory_mib() * MIB
        return {
            "cpu": 0.01,
            "maxcpu": state.cores,
            "mem": state.memory - free,
            "maxmem": state.memory,
            "disk": 8 * 1024 * MIB,
            "maxdisk": state.storages["local"].total,
            "uptime": int(time.time() - self._since),
        }

    def _nodes(self, call: Call) -> list[dict[str, Any]]:
        state = self._store.state
        entry: dict[str, Any] = {
            "node": state.node,
            "id": f"node/{state.node}",
            "type": "node",
            "status": "online",
            "level": "",
            "ssl_fingerprint": self._fingerprint(),
        }
        if access.may(state, call.user, f"/nodes/{state.node}", "Sys.Audit"):
            entry.update(self._figures())
        return [entry]

    def _resources(self, call: Call) -> list[dict[str, Any]]:
        state, wanted = self._store.state, call.text("type")
        listed: list[dict[str, Any]] = []
        for vmid, vm in sorted(state.vms.items()):
            if wanted in ("", "vm") and access.may(state, call.user, f"/vms/{vmid}", "VM.Audit"):
                view = self._qemu.summary(vm)
                view["maxcpu"] = view.pop("cpus")
                listed.append({"id": f"qemu/{vmid}", "type": "qemu", "node": state.node, "template": 0, **view})
        if wanted in ("", "node"):
            listed += [
                {key: value for key, value in node.items() if key != "ssl_fingerprint"} for node in self._nodes(call)
            ]
        for name, storage in sorted(state.storages.items()):
            if wanted in ("", "storage") and access.may(
                state, call.user, f"/storage/{name}", "Datastore.Audit", "Datastore.AllocateSpace"
            ):
                listed.append(
                    {
                        "id": f"storage/{state.node}/{name}",
                        "type": "storage",
                        "node": state.node,
                        "storage": name,
                        "plugintype": storage.type,
                        "content": ",".join(storage.content),
                        "status": "available",
                        "shared": 0,
                        "disk": self._storage.used(name),
                        "maxdisk": storage.total,
                    }
                )
        return listed

    def _cluster_status(self, call: Call) -> list[dict[str, Any]]:
        node = self._store.state.node
        return [{"type": "node", "id": f"node/{node}", "name": node, "online": 1, "local": 1, "nodeid": 0, "level": ""}]

    def _next_id(self, call: Call) -> str:
        taken = {vmid for each in self._store.cluster() for vmid in each.vms}
        if "vmid" in call.params:
            if call.vmid in taken:
                bad_parameters({"vmid": f"VM {call.vmid} already exists"})
            return str(call.vmid)
        return str(next(vmid for vmid in range(_FIRST_VMID, 10**9) if vmid not in taken))

    def _status(self, call: Call) -> dict[str, Any]:
        state, figures = self._store.state, self._figures()
        root = {"total": figures["maxdisk"], "used": figures["disk"], "avail": figures["maxdisk"] - figures["disk"]}
        return {
            "pveversion": f"pve-manager/{state.release}/0000000000000000",
            "kversion": f"Linux {KERNEL} (simulated)",
            "current-kernel": {"sysname": "Linux", "release": KERNEL, "version": "simulated", "machine": "x86_64"},
            "cpuinfo": {
                "cpus": state.cores,
                "cores": state.cores // 2 or 1,
                "sockets": 1,
                "model": "simulated",
                "mhz": "3000.000",
                "hvm": "1",
                "flags": "",
                "user_hz": 100,
            },
            "memory": {
                "total": figures["maxmem"],
                "used": figures["mem"],
                "free": figures["maxmem"] - figures["mem"],
                "available": figures["maxmem"] - figures["mem"],
            },
            "swap": {"total": 0, "used": 0, "free": 0},
            "rootfs": root | {"free": root["avail"]},
            "loadavg": ["0.00", "0.00", "0.00"],
            "cpu": figures["cpu"],
            "wait": 0,
            "idle": 0,
            "uptime": figures["uptime"],
            "boot-info": {"mode": "legacy-bios"},
            "ksm": {"shared": 0},
        }

    def _node_power(self, call: Call) -> None:
        if call.text("command") != "reboot":
            die("the rehearsal lab only reboots its nodes (simulated)")
        self._power.reboot_node()

    def _fingerprint(self) -> str:
        return str(self._certificates(None)[0]["fingerprint"])

    def _certificates(self, call: Call | None) -> list[dict[str, Any]]:
        pem = self._certificate.read_bytes()
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [
            {
                "filename": "pve-ssl.pem",
                "pem": pem.decode(),
                "fingerprint": ":".join(f"{byte:02X}" for byte in certificate.fingerprint(hashes.SHA256())),
                "subject": certificate.subject.rfc4514_string(),
                "issuer": certificate.issuer.rfc4514_string(),
                "san": [str(name.value) for name in names],
                "notbefore": int(certificate.not_valid_before_utc.timestamp()),
                "notafter": int(certificate.not_valid_after_utc.timestamp()),
            }
        ]

    # Tasks.

    def _audits(self, call: Call) -> bool:
        return access.may(self._store.state, call.user, f"/nodes/{self._store.state.node}", "Sys.Audit")

    def _list(self, call: Call) -> list[dict[str, Any]]:
        everything, source = self._audits(call), call.text("source", "archive")
        found = [
            task
            for task in reversed(self._store.state.tasks)
            if (everything or tasks.is_owner(call.user, task))
            and (source == "all" or (task.exitstatus is None) == (source == "active"))
            and call.text("vmid") in ("", task.id)
            and call.text("typefilter") in ("", task.type)
            and call.number("since") <= task.starttime
            and not (call.flag("errors") and task.exitstatus == "OK")
        ]
        start = call.number("start")
        return [tasks.list_view(task) for task in found[start : start + call.number("limit", 50)]]

    def _seen(self, call: Call) -> Task:
        task = self._tasks.find(call.text("upid"))
        if not tasks.is_owner(call.user, task) and not self._audits(call):
            no_permission(f"/nodes/{task.node}, Sys.Audit")
        return task

    def _task_status(self, call: Call) -> dict[str, Any]:
        return tasks.status_view(self._seen(call))

    def _task_log(self, call: Call) -> list[dict[str, Any]]:
        log = self._seen(call).log
        start = call.number("start")
        lines = log[start : start + call.number("limit", 50)]
        return [{"n": start + n, "t": line} for n, line in enumerate(lines, 1)] or [{"n": 1, "t": "no content"}]

    def _abort(self, call: Call) -> None:
        task = self._seen(call)
        if not tasks.is_owner(call.user, task):
            access.require(self._store.state, call.user, f"/nodes/{task.node}", "Sys.Modify")
        self._tasks.abort(task.upid)
