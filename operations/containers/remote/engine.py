# SPDX-License-Identifier: MIT
"""Runs on the guest: the container engine as it is, our containers in it, and whether their services answer."""

import glob
import http.client
import json
import os
import socket
import urllib.error
import urllib.request
from typing import Any

from operations.remote.common import answer, packages, run, text, units

SOCKET = "/run/docker.sock"
LABEL, SPEC, DECLARATION = "org.gpulab.service", "org.gpulab.spec", "org.gpulab.declaration"
#: What Podman makes units of; a file of ours says so in a section of its own.
QUADLET = "/etc/containers/systemd"


class Engine(http.client.HTTPConnection):
    """HTTP to Docker over its socket."""

    def __init__(self) -> None:
        super().__init__("localhost", timeout=30)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(30)
        self.sock.connect(SOCKET)


def read(
    package_names: list[str], unit_names: list[str], files: list[str], probes: dict[str, str], inside: bool
) -> dict[str, Any]:
    """The engine's state.

    `probes`: name to URL on this guest; what each answers is in `answers`. `inside`: also what nvidia-smi says in
    each container of ours that was given a device.
    """
    found: dict[str, Any] = {
        "packages": packages(package_names),
        "units": units(unit_names),
        "files": {path: text(path) for path in files},
        "certificates": {path: text(path) for path in sorted(glob.glob("/etc/*/certs.d/*/ca.crt"))},
        "info": None,
        "error": "",
        "images": [],
        "containers": {},
        # Containers of somebody else, by name, and which of them run.
        "foreign": {},
        "answers": {},
        "podman": podman(inside),
    }
    try:
        info = ask("/info")
        found["info"] = {
            "version": info["ServerVersion"],
            "storage": info["Driver"],
            "cdi": info.get("CDISpecDirs") or [],
            "live_restore": info["LiveRestoreEnabled"],
            "log_driver": info["LoggingDriver"],
        }
        found["images"] = sorted(digest for image in ask("/images/json") for digest in image["RepoDigests"] or [])
        for item in ask("/containers/json?all=1"):
            if LABEL in (item["Labels"] or {}):
                whole = ask(f"/containers/{item['Id']}/json")
                container = describe(whole, inside, "docker", whole["HostConfig"].get("DeviceRequests"))
                found["containers"][container["name"]] = container
            else:
                found["foreign"][item["Names"][0].lstrip("/")] = item["State"] == "running"
    except (OSError, ValueError, http.client.HTTPException) as error:
        # Nothing that was read before it is kept: half a list of containers would be worse than none.
        found |= {"info": None, "images": [], "containers": {}, "foreign": {}, "error": f"{SOCKET}: {error}"}
    found["answers"] = {name: probe(url) for name, url in probes.items()}
    return found


def podman(inside: bool) -> dict[str, Any] | None:
    """Podman, which has no daemon to ask: images, and our services by the files that Quadlet makes units of.

    None: it is absent.
    """
    # A line of the cgroups' version would stand in every answer of nvidia-smi.
    os.environ["PODMAN_IGNORE_CGROUPSV1_WARNING"] = "1"
    status, output, error = run("podman", "info", "--format", "json")
    if status == 127:
        return None
    info = json.loads(output) if status == 0 else {}
    found: dict[str, Any] = {
        "version": info.get("version", {}).get("Version"),
        "error": "" if status == 0 else (error.strip().splitlines() or ["no output"])[-1],
        "quadlet": os.path.exists("/usr/lib/systemd/system-generators/podman-system-generator"),
        "images": [],
        "containers": {},
    }
    if status == 0:
        images = json.loads(run("podman", "image", "ls", "--format", "json")[1] or "[]")
        found["images"] = sorted(digest for image in images for digest in image.get("RepoDigests") or [])
        found["containers"] = services(inside)
    return found


def services(inside: bool) -> dict[str, Any]:
    """Our services of Podman's, as `describe` has those of Docker's. One that is stopped has no container."""
    ours = {}
    for path in sorted(glob.glob(f"{QUADLET}/*.container")):
        section = (text(path) or "").partition("\n[X-Gpulab]\n")[2]
        if labels := dict(line.partition("=")[::2] for line in section.splitlines() if "=" in line):
            ours[os.path.basename(path).removesuffix(".container")] = labels
    if not ours:
        return {}
    listed = json.loads(run("podman", "ps", "--all", "--format", "json")[1] or "[]")
    there = [name for item in listed for name in item["Names"] if name in ours]
    inspected = json.loads(run("podman", "container", "inspect", *there)[1] or "[]") if there else []
    containers = {item["Name"].lstrip("/"): item for item in inspected}
    return {name: service(name, labels, containers.get(name), inside) for name, labels in ours.items()}


def service(name: str, labels: dict[str, str], item: dict[str, Any] | None, inside: bool) -> dict[str, Any]:
    """One service: what its file says (`labels`), and its container where there is one."""
    declared = {"name": name, "service": labels.get(LABEL, ""), "declaration": labels.get(DECLARATION, "{}")}
    if item is not None:
        devices = "\nAddDevice=" in (text(f"{QUADLET}/{name}.container") or "")
        # The label of the digest is the container's: it may be older than its file when a run was killed.
        return {**describe(item, inside, "podman", devices), **declared}
    shown = run("systemctl", "show", "-p", "ActiveState,Result,ExecMainStatus", f"{name}.service")[1]
    unit = dict(line.partition("=")[::2] for line in shown.splitlines())
    return {
        **declared,
        "spec": labels.get(SPEC, ""),
        "image": "",
        "status": "restarting" if unit.get("ActiveState") == "activating" else "exited",
        "health": "",
        "exit_code": int(unit.get("ExecMainStatus") or 0),
        "error": "" if unit.get("Result") in (None, "", "success") else f"its unit ended with: {unit['Result']}",
        "gpu": None,
    }


def ask(path: str) -> Any:
    """One GET to the engine's API."""
    connection = Engine()
    connection.request("GET", path)
    response = connection.getresponse()
    content = response.read()
    if response.status != 200:
        raise ValueError(f"{path}: HTTP {response.status}: {content[:200].decode(errors='replace')}")
    return json.loads(content)


def describe(item: dict[str, Any], inside: bool, engine: str, devices: Any) -> dict[str, Any]:
    """A container, and for one that runs with devices what nvidia-smi says inside."""
    state, labels = item["State"], item["Config"]["Labels"] or {}
    name = item["Name"].lstrip("/")
    # A container can keep running with its GPU gone, and its service then falls back to the CPU.
    gpu = run(engine, "exec", name, "nvidia-smi", "-L", timeout=30) if inside and state["Running"] and devices else None
    return {
        "name": name,
        "service": labels.get(LABEL, ""),
        "spec": labels.get(SPEC, ""),
        "declaration": labels.get(DECLARATION, "{}"),
        "image": item["Config"]["Image"],
        "status": state["Status"],
        "health": (state.get("Health") or {}).get("Status", ""),
        "exit_code": state["ExitCode"],
        "error": state["Error"],
        "gpu": None if gpu is None else {"status": gpu[0], "output": (gpu[1] + gpu[2]).strip()},
    }


def probe(url: str) -> dict[str, Any]:
    """What a GET answers: HTTP status (0: nothing did) and the JSON or the reason."""
    # A proxy of the environment has nothing to say on this guest's own addresses.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as response:
            content, status = response.read(), response.status
    except urllib.error.HTTPError as error:
        return {"status": error.code, "body": error.read()[:500].decode(errors="replace")}
    except (OSError, http.client.HTTPException) as error:
        return {"status": 0, "body": str(error)}
    try:
        return {"status": status, "body": json.loads(content)}
    except ValueError:
        return {"status": status, "body": content[:500].decode(errors="replace")}


if __name__ == "__main__":
    answer(read)
