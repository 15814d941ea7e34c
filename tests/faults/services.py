# SPDX-License-Identifier: MIT
"""What breaks in a guest's services and their engine; `test_guest.py` runs these on its lab."""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import inventory
from operations.proxmox.config import DATA_DISK_ID
from rehearsal import host
from tests.lab.clients import ollama_client
from tests.lab.commands import INVENTORY, Deployed

from . import milvus
from .fault import GUEST, Act, Fault, R, S, Words, both, service, sh

#: Those that run all the time.
SERVICES = ("ollama", "milvus")


def another_digest() -> Words:
    image = inventory.load(INVENTORY).guests[GUEST].services.served()["ollama"].image
    return service("ollama", image=re.sub("[0-9a-f]{64}$", "1" * 64, image))


def runs(deployed: Deployed) -> None:
    """What ran before the deploy that failed still runs."""
    assert deployed.on(GUEST, "docker", "inspect", "--format", "{{.State.Status}}", "ollama").strip() == "running"


def again(act: Act) -> Act:
    """Do it, and wait until the engine itself has all services running again."""

    def waited(deployed: Deployed) -> None:
        act(deployed)
        for name in SERVICES:
            within(30, f"{name} back by itself", ["docker", "exec", name, "true"])

    return waited


def within(seconds: float, what: str, command: list[str], expected: int = 0) -> str:
    """Until the command ends so in the guest; what it then said."""
    deadline = time.monotonic() + seconds
    while (done := host.run(GUEST, command)).returncode != expected:
        assert time.monotonic() < deadline, f"not {what} within {seconds:.0f} s: {done.stdout}{done.stderr}"
        time.sleep(0.5)
    return done.stdout + done.stderr


def back_with_the_disk(deployed: Deployed) -> None:
    """Starting any unit, as the healing's timer does, has systemd mount what it wants mounted.

    The services are stopped and started for it, or go on where that happens at once: it is the same file system.
    """
    deployed.on(GUEST, "umount", "--lazy", "/srv/data")
    units = [f"systemctl is-active --quiet {name}" for name in ("gpulab-data-disk", "gpulab-containers")]
    back = ["mountpoint --quiet /srv/data", *units, *(f"docker exec {name} true" for name in SERVICES)]
    within(120, "the services back with the disk", ["sh", "-c", " && ".join(back)])


def down_without_disk(deployed: Deployed) -> None:
    """Each service is down, cannot be started by hand, and says why; nobody tries to heal it."""
    for name in SERVICES:
        within(60, f"{name} down", ["docker", "exec", name, "true"], expected=1)
        refused = within(30, f"{name} refused", ["docker", "start", name], expected=1)
        assert f"bind source path does not exist: /srv/data/{name}" in refused, refused
    told = "nothing is mounted at /srv/data: left alone"
    within(60, "told so", ["sh", "-c", f"test $(gpulab-heal --status | grep -c ': {told}') = {len(SERVICES)}"])


WITHOUT_IMAGE = """image=$(docker inspect --format '{{.Config.Image}}' ollama)
docker rm --force ollama > /dev/null
docker rmi --force "$image" > /dev/null"""
#: Docker puts layers there before it unpacks them.
FULL = """mkdir -p /var/lib/docker/tmp
mount -t tmpfs -o size=64k full /var/lib/docker/tmp"""
AWAY = "iptables -I OUTPUT -p tcp --dport 5000 -j REJECT --reject-with tcp-reset"
NETWORK_GONE = """docker stop ollama > /dev/null
docker network rm gpulab-ollama"""
#: As when the VM loses it: neither by its id nor by its file system is it to be found.
DISK_GONE = f"""cp -a /dev/disk/by-id/{DATA_DISK_ID} /dev/gone-link
mv $(readlink -f /dev/disk/by-id/{DATA_DISK_ID}) /dev/gone-disk
rm /dev/disk/by-id/{DATA_DISK_ID}
umount --lazy /srv/data"""
DISK_BACK = f"""cp -a /dev/gone-link /dev/disk/by-id/{DATA_DISK_ID}
mv /dev/gone-disk $(readlink -f /dev/disk/by-id/{DATA_DISK_ID})
rm /dev/gone-link"""
FOREIGN = """image=$(docker inspect --format '{{.Config.Image}}' ollama)
docker rm --force ollama > /dev/null
docker create --name ollama "$image" > /dev/null"""


def access(**keys: Any) -> Words:
    """Words of a deploy in which `access` is otherwise."""
    return ("--data", f"access={json.dumps(keys)}")


class Load:
    """Clients of Ollama with streamed answers; whatever they lose, the fault has lost."""

    def begin(self, deployed: Deployed) -> None:
        self.over, self.lost, self.done = threading.Event(), list[str](), 0
        self.clients = [threading.Thread(target=self.ask) for _ in range(4)]
        for each in self.clients:
            each.start()

    def ask(self) -> None:
        with ollama_client("astro") as client:
            # Below the pace that one tenant may have.
            while not self.over.wait(0.5):
                try:
                    parts = list(client.generate(model="tiny", prompt="stars", stream=True, options={"num_predict": 8}))
                    self.done += 1
                    if not parts[-1].done:
                        self.lost.append(f"{len(parts)} parts without an end")
                except Exception as error:
                    self.lost.append(repr(error))

    def end(self, deployed: Deployed) -> None:
        self.over.set()
        for each in self.clients:
            each.join()
        assert self.lost == [] and self.done > 0, (self.lost[:3], self.done)


load = Load()

FAULTS = [
    Fault("nginx stopped by hand", S, sh("systemctl stop nginx"), checks=("containers.access.nginx",)),
    Fault(
        "the proxy's key replaced by another",
        S,
        sh("openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out /etc/nginx/gpulab/server.key"),
        checks=("containers.access.nginx",),
    ),
    Fault("the proxy reloaded under load", S, load.begin, words=lambda: access(burst=90), mend=load.end),
    Fault(
        "a file of somebody else's that nginx refuses",
        R,
        sh("echo 'nonsense on;' > /etc/nginx/conf.d/site.conf"),
        says="nginx refuses the new files; the ones before stay, and nginx runs with them",
        words=lambda: access(burst=80),
        mend=sh("rm -f /etc/nginx/conf.d/site.conf"),
    ),
    Fault(
        "a declaration with which Ollama does not start",
        R,
        runs,
        says="The previous container runs again.",
        words=lambda: service("ollama", environment={"PATH": "/nowhere"}, ready_s=8),
        mend=runs,
    ),
    Fault(
        "the registry away while the image is needed",
        R,
        both(sh(WITHOUT_IMAGE), sh(AWAY)),
        says="ollama: its registry does not answer",
        mend=sh(AWAY.replace("-I", "-D")),
    ),
    Fault(
        "a digest that the registry does not have",
        R,
        runs,
        says="ollama: its registry has no such digest",
        words=another_digest,
        mend=runs,
    ),
    Fault(
        "the disk full while an image is pulled",
        R,
        both(sh(WITHOUT_IMAGE), sh(FULL)),
        says="ollama: the guest's disk is full",
        mend=sh("umount /var/lib/docker/tmp"),
    ),
    Fault("the engine restarted", S, again(sh("systemctl restart docker"))),
    Fault(
        "the engine killed",
        S,
        again(sh("systemctl kill --signal=KILL docker")),
    ),
    Fault(
        "a container's process killed",
        S,
        again(sh("kill -9 $(docker inspect --format '{{.State.Pid}}' ollama)")),
    ),
    Fault(
        "a container stopped by docker kill",
        S,
        sh("docker kill ollama"),
        checks=("containers.ollama.running",),
    ),
    Fault("a container's network removed", S, sh(NETWORK_GONE), checks=("containers.ollama.running",)),
    Fault(
        "somebody else's container of a service's name",
        R,
        sh(FOREIGN),
        says="ollama: a container of that name is not gpulab's",
        mend=sh("docker rm --force ollama"),
    ),
    Fault(
        "the data disk unmounted by hand",
        S,
        back_with_the_disk,
    ),
    Fault(
        "the data disk gone from the VM",
        R,
        both(sh(DISK_GONE), down_without_disk),
        says="no such disk in the guest",
        mend=sh(DISK_BACK),
        checks=("system.data_disk", *(f"containers.{name}.running" for name in SERVICES)),
    ),
    *milvus.FAULTS,
]
