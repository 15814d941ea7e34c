# SPDX-License-Identifier: MIT
"""The container toolkit: its packages at one version, and a CDI specification that fits the loaded driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyinfra.api import StringCommand

from inventory import GpulabError
from operations import apt, files, step
from operations.files import File, render
from operations.nvidia.facts import ToolkitFacts
from operations.plan import file_diff

#: Where NVIDIA's own unit writes it, too. It does not outlive a boot.
SPECIFICATION = "/var/run/cdi/nvidia.yaml"
#: /var/run is /run.
SAME_FILE = (SPECIFICATION, SPECIFICATION.removeprefix("/var"))

#: Brings up what containers need of the GPU, before the engine starts at boot.
UNIT = "gpulab-gpu.service"
UNIT_FILE = f"/etc/systemd/system/{UNIT}"


@dataclass(frozen=True)
class Actions:
    """What has to happen. `generate`: why the specification has to be written, empty when it has not."""

    install: tuple[str, ...] = ()
    unit_file: bool = False
    enable: bool = False
    generate: str = ""
    #: Files of others to take away, each with the reason. Their last version is kept.
    remove: Mapping[str, str] = field(default_factory=dict)

    def any(self) -> bool:
        return bool(self.install or self.unit_file or self.enable or self.generate or self.remove)


def unit_file() -> str:
    return render("nvidia/gpulab-gpu.service.j2", specification=SPECIFICATION)


def outdated(found: Mapping[str, Any]) -> str:
    """Why the CDI specification is not right, empty when it is."""
    if not found.get("specification"):
        return "there is none"
    if found["specification_versions"] != [found["loaded"]]:
        seen = ", ".join(found["specification_versions"]) or "no driver"
        return f"it describes {seen}; loaded is {found['loaded'] or 'no driver'}"
    if found["specification_missing"]:
        return f"it names {found['specification_missing'][0]}, which is not there"
    return ""


def decide(found: Mapping[str, Any], packages: Sequence[str], version: str) -> Actions:
    """What has to happen for the toolkit to be as declared.

    Raises:
        GpulabError: NVIDIA's own unit is told to write a specification somewhere else, at each boot anew.
    """
    refresh = found.get("refresh")
    if refresh and refresh["output"] not in SAME_FILE:
        raise GpulabError(
            f"nvidia-cdi-refresh.service is told to write {refresh['output']}, a second description of the GPU",
            f"Expected one, in {SPECIFICATION}: of two, the one that is out of date may win.",
            f"take NVIDIA_CTK_CDI_OUTPUT_FILE_PATH out of {refresh['file']} in the guest",
        )
    installed = found.get("packages", {})
    wrong = [name for name in packages if installed.get(name) != version]
    return Actions(
        install=tuple(f"{name}={version}" for name in packages) if wrong else (),
        unit_file=found.get("unit_file") != unit_file(),
        enable=found.get("unit", {}).get("enabled") != "enabled",
        # A new toolkit may write its specification otherwise.
        generate=outdated(found) or ("the toolkit changes" if wrong else ""),
        remove=surplus(found),
    )


def surplus(found: Mapping[str, Any]) -> dict[str, str]:
    """What describes the GPU to engines besides our specification, with the reason why it has to go."""
    # A boot empties the folder of ours, and until it is written anew, what another file says would be taken.
    gone = dict.fromkeys(found.get("seconds", ()), f"it describes the same devices as {SPECIFICATION}")
    if hook := found.get("hook"):
        gone[hook] = "it injects the GPU by a hook, which a daemon-reload of systemd undoes"
    return gone


@step.step
def toolkit(packages: Sequence[str], version: str) -> step.Commands:
    """
    Ensure that the container toolkit is installed and that the CDI specification fits the driver, now and at boot.

    It is the only one of the GPU: another that describes the same devices is taken away, and so is the hook of old
    toolkits. Links in /dev/char are not made: systemd 240 and newer does not ask for them.

    + packages: the toolkit's packages, all of one version
    + version: their exact package version
    """
    found = step.read(ToolkitFacts, package_names=list(packages), specification=SPECIFICATION, unit=UNIT)
    actions = decide(found, packages, version)
    if not actions.any():
        step.noop(f"toolkit {version} is installed, and {SPECIFICATION} describes driver {found['loaded']}")
        return
    installed = found.get("packages", {})
    if actions.install:
        lines = tuple(f"{name}: {installed.get(name) or 'absent'} -> {version}" for name in packages)
        step.changes("install the container toolkit", lines)
    if actions.unit_file:
        step.changes(f"file {UNIT_FILE}", file_diff(found.get("unit_file"), unit_file()))
    if actions.enable:
        step.changes(f"enable {UNIT}")
    for path, reason in actions.remove.items():
        step.changes(f"remove file {path}", (reason,))
    if actions.generate:
        step.changes(f"write {SPECIFICATION}", (actions.generate,))
    if actions.install:
        yield apt.install(actions.install, repin=True)
    changing = dict.fromkeys(actions.remove) | ({UNIT_FILE: File(unit_file())} if actions.unit_file else {})
    if changing:
        yield files.write(changing)
    if actions.unit_file:
        yield StringCommand("systemctl", "daemon-reload")
    if actions.enable:
        yield StringCommand("systemctl", "enable", UNIT)
    if actions.generate:
        yield StringCommand("nvidia-ctk", "cdi", "generate", f"--output={SPECIFICATION}")
        yield step.call(check, list(packages), version)


def check(packages: Sequence[str], version: str) -> None:
    """
    Raises:
        GpulabError: the toolkit has another version, or its specification does not fit the driver.
    """
    found = step.read(ToolkitFacts, package_names=list(packages), specification=SPECIFICATION, unit=UNIT)
    actions = decide(found, packages, version)
    if actions.install:
        seen = ", ".join(f"{name} {found['packages'][name] or 'absent'}" for name in packages)
        raise GpulabError(f"apt installed another container toolkit than {version}", f"Seen: {seen}")
    if actions.generate:
        raise GpulabError(
            f"{SPECIFICATION} is not right: {actions.generate}",
            resolution="`nvidia-ctk cdi generate` in the guest says what it finds",
        )
