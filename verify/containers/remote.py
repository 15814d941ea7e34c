# SPDX-License-Identifier: MIT
"""Runs on the guest, as root, with the standard library alone: prints the container engine's state as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from verify.sockets import listening

#: The label of an image that stands in for the real one.
STAND_IN = "org.gpulab.stand-in"
#: The label of a container of ours: the name of its service.
SERVICE = "org.gpulab.service"
#: The label of a tenant's job: the tenant's name.
TENANT = "org.gpulab.tenant"
#: The kind of the GPU's devices in CDI specifications.
KIND = "nvidia.com/gpu"
#: Where Podman looks for them, as its own default and as deploy's settings say.
PODMAN_FOLDERS = ["/etc/cdi", "/var/run/cdi"]
#: What looks after the services.
HEALING = "gpulab-heal.timer"
#: Variables that are settings of a service; others may hold what is nobody's business.
SETTINGS = ("OLLAMA_", "CUDA_MPS_")


def observe(arguments: dict[str, Any], root: Path = Path("/")) -> dict[str, Any]:
    """`arguments`: `engine` (docker or podman), `mount` of the data disk, and `services`: name to its `ports` on the
    guest and what to ask it (`asks`: key to path, or path and body, on the first of its ports).
    """
    kind, mount = arguments["engine"], arguments["mount"]
    engine = podman(root) if kind == "podman" else docker()
    listeners = listening(root)
    services = {
        name: service(root, kind, name, mount, asked, listeners) for name, asked in arguments["services"].items()
    }
    files = specifications([root / folder.lstrip("/") for folder in engine["cdi_folders"]])
    says = {f"nvidia-smi in {name}": each.get("nvidia_smi", "") for name, each in services.items()}
    says |= {f"the image of {name}": each.get("stand_in") or "" for name, each in services.items()}
    return {
        "engine": engine,
        "cdi": sorted({f"{text['kind']}={device}" for text in files.values() for device in text["devices"]}),
        "specifications": {path: described(root, text) for path, text in files.items() if text["kind"] == KIND},
        "loaded": (read(root / "sys/module/nvidia/version") or "").strip() or None,
        "services": services,
        "data": {
            "mounted": os.path.ismount(mount),
            "containers": ours(kind, mount),
            "bound": bound_units(mount),
        },
        "healing": healing(root),
        "simulated": [source for source, text in says.items() if "simulated" in text.lower()],
    }


def docker() -> dict[str, Any]:
    """Docker, as its unit and its daemon say. `version` is None when it does not answer."""
    information = as_json(output(["docker", "info", "--format", "{{json .}}"])) or {}
    return {
        "active": output(["systemctl", "is-active", "docker.service"]).strip(),
        "version": information.get("ServerVersion"),
        "cdi_folders": information.get("CDISpecDirs") or [],
        "live_restore": information.get("LiveRestoreEnabled"),
    }


def podman(root: Path) -> dict[str, Any]:
    """Podman, which has no daemon: it is active when it answers and Quadlet can make units."""
    information = as_json(output(["podman", "info", "--format", "json"])) or {}
    generator = root / "usr/lib/systemd/system-generators/podman-system-generator"
    return {
        "active": "active" if generator.exists() else "without Quadlet",
        "version": (information.get("version") or {}).get("Version"),
        "cdi_folders": PODMAN_FOLDERS,
        "live_restore": None,
    }


def specifications(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """CDI specifications by path: `kind`, names of their `devices`, and the `text`.

    nvidia-ctk writes YAML, which the standard library cannot read: kind and device names are found by their lines.
    """
    found = {}
    for folder in folders:
        for path in sorted(folder.glob("*")) if folder.is_dir() else []:
            if path.suffix not in (".yaml", ".yml", ".json"):
                continue
            text = path.read_text(errors="replace")
            kind = re.search(r"""["']?kind["']?\s*:\s*["']?([^\s"',]+)""", text)
            # Names of devices, not of hooks or variables: these stand as list items or object members.
            names = re.findall(r"""(?:-\s+|["'{,]\s*|^\s+)["']?name["']?\s*:\s*["']?([^\s"',}]+)""", text, re.M)
            if kind:
                found[str(path)] = {"kind": kind[1], "devices": sorted(set(names)), "text": text}
    return found


def described(root: Path, specification: dict[str, Any]) -> dict[str, Any]:
    """A specification: its `devices`, a `digest` of its text, driver `versions` and `missing` files among its paths."""
    text = specification["text"]
    paths = set(re.findall(r"(?:hostPath|path)\"?: *\"?(/[^\"\s,}]+)", text))
    return {
        "devices": specification["devices"],
        "digest": hashlib.sha256(text.encode()).hexdigest(),
        "versions": sorted(set(re.findall(r"lib(?:cuda|nvidia-ml)\.so\.([0-9]+(?:\.[0-9]+)+)", text))),
        "missing": sorted(path for path in paths if not (root / path.lstrip("/")).exists()),
    }


def service(
    root: Path, engine: str, name: str, mount: str, asked: dict[str, Any], listeners: list[dict[str, Any]]
) -> dict[str, Any]:
    """A service's container: what runs, from which image, where its files lie, what it may do, what it answers."""
    ports = asked["ports"]
    listens = [each for each in listeners if each["port"] in ports]
    inspected = (as_json(output([engine, "inspect", "--type", "container", name])) or [None])[0]
    if inspected is None:
        return {"exists": False, "running": False, "listens": listens}
    image = (as_json(output([engine, "image", "inspect", inspected["Image"]])) or [{}])[0]
    running = bool(inspected["State"]["Running"])
    found: dict[str, Any] = {
        "exists": True,
        "running": running,
        "status": inspected["State"]["Status"],
        "health": (inspected["State"].get("Health") or {}).get("Status"),
        "digests": image.get("RepoDigests") or [],
        "stand_in": (image.get("Labels") or (image.get("Config") or {}).get("Labels") or {}).get(STAND_IN),
        "storage": storage(name, inspected, mount),
        "listens": listens,
        "published": published(inspected),
        "limits": limits(root, inspected),
        "privileges": privileges(root, inspected),
    }
    if running:
        smi = run([engine, "exec", name, "nvidia-smi", "-L"])
        found["nvidia_smi"] = smi.stdout + smi.stderr
        found["gpus"] = (
            [line for line in smi.stdout.splitlines() if line.startswith("GPU ")] if not smi.returncode else []
        )
        found["environment"] = environment(root, inspected["State"].get("Pid") or 0)
        found.update(
            {key: ask(ports[0], *([what] if isinstance(what, str) else what)) for key, what in asked["asks"].items()}
        )
    return found


def environment(root: Path, pid: int) -> dict[str, str]:
    """The settings among the variables that its first process was started with, as the kernel has them."""
    variables = (read(root / f"proc/{pid}/environ") or "").split("\0")
    return dict(each.partition("=")[::2] for each in variables if each.startswith(SETTINGS))


def published(inspected: dict[str, Any]) -> list[str]:
    """`address:port` on the guest of every port that the engine hands to the container; an empty address is all."""
    settings = inspected["HostConfig"].get("PortBindings") or {}
    return sorted(
        f"{each.get('HostIp') or '0.0.0.0'}:{each.get('HostPort') or 'any'}"
        for bound in settings.values()
        for each in bound or []
    )


def limits(root: Path, inspected: dict[str, Any]) -> dict[str, int | None]:
    """MiB of main memory and number of processes that it may have, as the kernel has them or else the engine; None:
    no limit.
    """
    group = root / "sys/fs/cgroup" / (cgroup(root, inspected["State"].get("Pid") or 0) or "-").lstrip("/")
    settings = inspected["HostConfig"]
    memory = number(read(group / "memory.max"), settings.get("Memory"))
    return {
        "memory_mib": memory // 2**20 if memory else None,
        "pids": number(read(group / "pids.max"), settings.get("PidsLimit")),
    }


def number(told: str | None, declared: int | None) -> int | None:
    """A limit of a control group (`max`: none), or what the engine was told (0 or less: none) where there is no such
    file.
    """
    if told is not None:
        return int(told) if told.strip().isdigit() else None
    return declared if declared and declared > 0 else None


def cgroup(root: Path, pid: int) -> str | None:
    """A process' control group, below the mount of cgroup v2; None: no such process."""
    lines = (read(root / f"proc/{pid}/cgroup") or "").splitlines()
    return next((line[3:] for line in lines if line.startswith("0::")), None)


def privileges(root: Path, inspected: dict[str, Any]) -> dict[str, Any] | None:
    """What its first process may really do, as the kernel has it; None: there is none."""
    pid = inspected["State"].get("Pid") or 0
    told = dict(line.partition(":\t")[::2] for line in (read(root / f"proc/{pid}/status") or "").splitlines())
    if not pid or "CapBnd" not in told:
        return None
    mounts = [line.split() for line in (read(root / f"proc/{pid}/mountinfo") or "").splitlines()]
    # The last of those on one path is the one that is seen.
    top = [words[5].split(",") for words in mounts if len(words) > 5 and words[4] == "/"]
    options = inspected["HostConfig"].get("SecurityOpt") or []
    return {
        "privileged": bool(inspected["HostConfig"].get("Privileged")),
        "read_only": bool(top) and "ro" in top[-1],
        "capabilities": int(told["CapBnd"], 16),
        "no_new_privileges": told.get("NoNewPrivs") == "1",
        "unconfined": any("seccomp" in option and "unconfined" in option for option in options),
        "uid": int(told["Uid"].split()[0]),
        "ipc": "host" if namespace(root, pid, "ipc") == namespace(root, 1, "ipc") else "own",
        "networks": sorted((inspected.get("NetworkSettings") or {}).get("Networks") or {}),
    }


def namespace(root: Path, pid: int, kind: str) -> str:
    try:
        return os.readlink(root / f"proc/{pid}/ns/{kind}")
    except OSError:
        return ""


def ours(engine: str, data: str) -> list[dict[str, Any]]:
    """Every container of ours, whatever its state, with the folders of the guest that it sees."""
    ids = output([engine, "ps", "--all", "--quiet", "--no-trunc", "--filter", f"label={SERVICE}"]).split()
    inspected = (as_json(output([engine, "inspect", "--type", "container", *ids])) or []) if ids else []
    return [
        {
            "name": item["Name"].lstrip("/"),
            "id": item.get("Id", ""),
            "service": (item.get("Config", {}).get("Labels") or {}).get(SERVICE, ""),
            "tenant": (item.get("Config", {}).get("Labels") or {}).get(TENANT, ""),
            "running": bool(item["State"]["Running"]),
            "gpu": way_of_the_gpu(item["HostConfig"]),
            "folders": [
                {
                    "source": mount["Source"],
                    "written": bool(mount.get("RW", True)),
                    "on_data_disk": on_disk(mount["Source"], data),
                }
                for mount in item.get("Mounts") or []
                if mount.get("Type") in ("bind", "volume")
            ],
        }
        for item in inspected
    ]


def way_of_the_gpu(settings: dict[str, Any]) -> str | None:
    """How a container was given the GPU: `cdi`, by a `hook` (--gpus, the nvidia runtime), or not at all."""
    drivers = [request.get("Driver") for request in settings.get("DeviceRequests") or []]
    if settings.get("Runtime") == "nvidia" or any(driver != "cdi" for driver in drivers):
        return "hook"
    return "cdi" if drivers else None


def on_disk(path: str, data: str) -> bool:
    """Does the path lie on what is mounted as the data disk?"""
    return os.path.ismount(data) and os.path.exists(path) and os.stat(path).st_dev == os.stat(data).st_dev


def bound_units(data: str) -> list[str]:
    """The active units that systemd stops when the mount goes."""
    unit = output(["systemd-escape", "--path", "--suffix=mount", data]).strip()
    names = output(["systemctl", "show", "--property=BoundBy", "--value", unit]).split()
    return [name for name in names if output(["systemctl", "is-active", name]).strip() == "active"]


def storage(name: str, inspected: dict[str, Any], data: str) -> dict[str, Any]:
    """Where the service's data lies: path `inside` and `outside` of its container, and whether on the data disk."""
    mounts = inspected.get("Mounts") or []
    if name == "ollama":
        environment = dict(item.partition("=")[::2] for item in inspected["Config"].get("Env") or [])
        return models_folder(environment, mounts, data)
    below = [each for each in mounts if each.get("RW", True) and _within(each["Source"], f"{data}/{name}")]
    if not below:
        return {"inside": "its folders", "outside": None, "on_data_disk": False}
    nearest = min(below, key=lambda each: len(each["Source"]))
    return {
        "inside": nearest["Destination"],
        "outside": nearest["Source"],
        "on_data_disk": on_disk(nearest["Source"], data),
    }


def _within(path: str, folder: str) -> bool:
    return Path(path).is_relative_to(folder)


def models_folder(environment: dict[str, str], mounts: list[dict[str, Any]], data: str) -> dict[str, Any]:
    """Where Ollama's models lie on the guest, and whether that is on the data disk."""
    inside = Path(environment.get("OLLAMA_MODELS") or Path(environment.get("HOME") or "/root") / ".ollama/models")
    holding = [item for item in mounts if inside.is_relative_to(item["Destination"])]
    if not holding:
        return {"inside": str(inside), "outside": None, "on_data_disk": False}
    nearest = max(holding, key=lambda item: len(item["Destination"]))
    outside = Path(nearest["Source"])
    return {"inside": str(inside), "outside": str(outside), "on_data_disk": on_disk(str(outside), data)}


def ask(port: int, path: str, body: dict[str, Any] | None = None, limit_s: float = 10.0) -> dict[str, Any]:
    """What the service answers on the guest's loopback address: `json`, or `error`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    # The guest may have a proxy in its environment; loopback is never behind it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=limit_s) as answer:
            return {"json": json.loads(answer.read())}
    except urllib.error.HTTPError as error:
        return {"error": f"HTTP {error.code}: {error.read(300).decode(errors='replace').strip()}"}
    except (OSError, ValueError) as error:
        return {"error": str(error)}


#: Seconds for Ollama to take a model out of memory.
UNLOAD_S = 10.0


def load_model(port: int, model: str, limit_s: float) -> dict[str, Any]:
    """Load a model as an empty prompt does, and what then lies in memory. It is left as it was found: a model that
    nobody had loaded is taken out again, and the card is free for the benchmarks.
    """
    before = in_memory(port)
    loaded = ask(port, "/api/generate", {"model": model, "prompt": "", "stream": False}, limit_s)
    found = {"load": loaded, "ps": ask(port, "/api/ps"), "simulated": []}
    if "json" in loaded and model not in before:
        ask(port, "/api/generate", {"model": model, "prompt": "", "stream": False, "keep_alive": 0})
        end = time.monotonic() + UNLOAD_S
        while model in in_memory(port) and time.monotonic() < end:
            time.sleep(0.1)
    return found


def in_memory(port: int) -> set[str]:
    """Models that Ollama has loaded, by the names that they were asked for with."""
    answer = ask(port, "/api/ps").get("json")
    names = [each["name"] for each in answer.get("models") or []] if isinstance(answer, dict) else []
    return {name for full in names for name in (full, full.removesuffix(":latest"))}


def healing(root: Path) -> dict[str, Any]:
    """The timer that restarts services, the age of its last look in seconds, and the alarms that it has raised."""
    names = ("ActiveState", "UnitFileState")
    shown = output(["systemctl", "show", f"--property={','.join(names)}", HEALING]).splitlines()
    told = dict(line.partition("=")[::2] for line in shown)
    state, alarms = root / "var/lib/gpulab/heal", {}
    for path in sorted((state / "alarm").glob("*")) if (state / "alarm").is_dir() else []:
        alarms[path.name] = " ".join((read(path) or "").split())[:300]
    look = state / "look.json"
    return {
        "active": told.get("ActiveState", ""),
        "enabled": told.get("UnitFileState", ""),
        "age_s": time.time() - look.stat().st_mtime if look.exists() else None,
        "alarms": alarms,
    }


def read(path: Path) -> str | None:
    """A file's text; None: no such file."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def as_json(text: str) -> Any:
    """The parsed text; None: it is no JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A command that ended, with status 127 when it is not there or takes too long."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def output(command: list[str]) -> str:
    """What a command prints."""
    return run(command).stdout


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    json.dump(
        load_model(given["port"], given["model"], given["limit_s"]) if "model" in given else observe(given), sys.stdout
    )
