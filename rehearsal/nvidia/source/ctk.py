# SPDX-License-Identifier: MIT
"""nvidia-ctk of the simulated toolkit: writes the CDI specification of the simulated card, edits Docker's settings.

It runs in the guest as /usr/bin/nvidia-ctk. The libraries go into a container under the names programs ask for, so
that no hook has to make links; the card's state goes with them, so that host and containers see one card.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

KIND = "nvidia.com/gpu"
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
SPEC_FOLDERS = (Path("/etc/cdi"), Path("/var/run/cdi"))
COMMON_NODES = ("nvidia-modeset", "nvidia-uvm", "nvidia-uvm-tools", "nvidiactl")


class Refused(Exception):
    """Ends the program with this message in the real tool's log form."""


def log(level: str, message: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(f'time="{stamp}" level={level} msg={json.dumps(message)}', file=sys.stderr)


def uuids() -> list[str]:
    """The UUID of every card that NVML lists."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise Refused(f"failed to initialize NVML: ERROR_LIBRARY_NOT_FOUND ({error})") from None
    nvml.nvmlErrorString.restype = ctypes.c_char_p
    if failed := nvml.nvmlInit_v2():
        reason = nvml.nvmlErrorString(failed).decode()
        raise Refused(f"failed to create device CDI specs: failed to initialize NVML: {reason}")
    count, device, text = ctypes.c_uint(), ctypes.c_void_p(), ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    found = []
    for index in range(count.value):
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) or nvml.nvmlDeviceGetUUID(device, text, 96):
            raise Refused(f"failed to get device handle for device {index}")
        found.append(text.value.decode())
    nvml.nvmlShutdown()
    return found


def mount(host: str, container: str) -> dict[str, Any]:
    return {"hostPath": host, "containerPath": container, "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"]}


def specification(cards: list[str], nodes: list[str]) -> dict[str, Any]:
    """The CDI spec: one device a card, by index and by UUID, and `all`."""
    libraries = [LIBRARIES / name for name in ("libnvidia-ml.so.1", "libcuda.so.1")]
    mounts = [mount(str(path.resolve()), str(path)) for path in libraries]
    mounts.append(mount("/usr/bin/nvidia-smi", "/usr/bin/nvidia-smi"))
    # The loaded driver's state. Docker makes all mounts of a --read-only container read-only, these too.
    mounts.append(mount("/run/lab-gpu", "/run/lab-gpu"))
    if Path("/var/lib/lab-hardware").is_dir():
        mounts.append(mount("/var/lib/lab-hardware", "/var/lib/lab-hardware"))

    def device(name: str, paths: list[str]) -> dict[str, Any]:
        return {"name": name, "containerEdits": {"deviceNodes": [{"path": path} for path in paths]}}

    named = [(str(index), [f"/dev/nvidia{index}"]) for index in range(len(cards))]
    named += [(uuid, [f"/dev/nvidia{index}"]) for index, uuid in enumerate(cards)]
    named += [("all", [f"/dev/nvidia{index}" for index in range(len(cards))])]
    return {
        "cdiVersion": "0.7.0",
        "kind": KIND,
        "annotations": {"org.gpulab.stand-in": "simulated"},
        "devices": [device(name, paths) for name, paths in named],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "deviceNodes": [{"path": f"/dev/{name}"} for name in nodes],
            "mounts": mounts,
        },
    }


def yaml(value: Any, indent: str = "") -> str:
    """YAML of dictionaries, lists and strings; strings are quoted as JSON, which YAML reads."""
    if isinstance(value, dict):
        return "".join(f"{indent}{key}:{nested(item, indent)}" for key, item in value.items())
    # The dash replaces the last two columns of the indentation of the item's first line.
    deeper = indent + "  "
    items = (yaml(item, deeper) if isinstance(item, dict) else f"{deeper}{json.dumps(item)}\n" for item in value)
    return "".join(f"{indent}- {item[len(deeper) :]}" for item in items)


def nested(item: Any, indent: str) -> str:
    if isinstance(item, (dict, list)):
        return "\n" + yaml(item, indent + ("  " if isinstance(item, dict) else ""))
    return f" {json.dumps(item)}\n"


def generate(words: list[str]) -> None:
    target = option(words, "--output") or os.environ.get("NVIDIA_CTK_CDI_OUTPUT_FILE_PATH")
    cards = uuids()
    for index in range(len(cards)):
        log("info", f"Selecting /dev/nvidia{index} as /dev/nvidia{index} (simulated)")
    spec = specification(cards, [name for name in COMMON_NODES if Path("/dev", name).exists()])
    text = json.dumps(spec, indent=2) + "\n" if option(words, "--format") == "json" else "---\n" + yaml(spec)
    if not target:
        print(text, end="")
        return
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Docker may read the folder at any moment: it must find the old file or the new one.
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.chmod(0o644)
    temporary.rename(path)
    log("info", f"Generated CDI spec with version {spec['cdiVersion']}")


def devices_in(text: str) -> list[str]:
    """Full names of the devices of a spec, YAML of ours or JSON."""
    kind = re.search(r'"?kind"?:\s*"?([^"\s,]+)', text)
    return [f"{kind[1]}={name}" for name in re.findall(r'"?name"?:\s*"?([^"\s,]+)', text)] if kind else []


def list_devices() -> None:
    found: list[str] = []
    for folder in SPEC_FOLDERS:
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.json")]):
            found += devices_in(path.read_text())
    log("info", f"Found {len(found)} CDI devices")
    print("".join(f"{name}\n" for name in found), end="")


def configure(words: list[str]) -> None:
    """Enter the NVIDIA runtime into Docker's settings; with `--cdi.enabled`, switch CDI on as well."""
    if (runtime := option(words, "--runtime") or "docker") != "docker":
        raise Refused(f"unrecognized runtime '{runtime}' (the simulated tool knows docker)")
    path = Path(option(words, "--config") or "/etc/docker/daemon.json")
    settings = json.loads(path.read_text()) if path.exists() and path.read_text().strip() else {}
    settings.setdefault("runtimes", {})["nvidia"] = {"args": [], "path": "nvidia-container-runtime"}
    if any(word in ("--cdi.enabled", "--cdi.enabled=true", "--enable-cdi") for word in words):
        settings.setdefault("features", {})["cdi"] = True
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=4))
    log("info", f"Wrote updated config to {path}")
    log("info", "It is recommended that docker daemon be restarted.")


def char_links() -> None:
    """/dev/char/MAJOR:MINOR for every node of the card."""
    Path("/dev/char").mkdir(exist_ok=True)
    for node in sorted(Path("/dev").glob("nvidia*")):
        number = node.stat().st_rdev
        link = Path(f"/dev/char/{os.major(number)}:{os.minor(number)}")
        if not link.is_symlink():
            log("info", f"Creating link {link} => {node}")
            link.symlink_to(f"../{node.name}")


def option(words: list[str], name: str) -> str | None:
    for index, word in enumerate(words):
        if word.startswith(name + "="):
            return word.partition("=")[2]
        if word == name and index + 1 < len(words):
            return words[index + 1]
    return None


def main(words: list[str]) -> int:
    try:
        match [word for word in words if not word.startswith("-")][:2]:
            case [] if "--version" in words or "-v" in words:
                print(f"NVIDIA Container Toolkit CLI version {VERSION} (simulated)")
            case ["cdi", "generate"]:
                generate(words)
            case ["cdi", "list"]:
                list_devices()
            case ["runtime", "configure"]:
                configure(words)
            case ["system", "create-dev-char-symlinks"]:
                char_links()
            case _:
                raise Refused(f"the simulated nvidia-ctk does not know `{' '.join(words)}`")
    except Refused as refused:
        log("error", str(refused))
        return 1
    return 0


#: Replaced by the package's version when it is built.
VERSION = "@VERSION@"

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
