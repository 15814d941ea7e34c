# SPDX-License-Identifier: MIT
"""What can be broken on a rehearsal lab: a promise for each line, how it is broken and mended, and which checks see it.

Scripts are of bash, run as root on a host by its console, not over SSH. What the simulated hardware says is changed
where its stand-ins look: `/var/lib/lab-hardware` on a guest, the files that stand in for sysfs on a node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from inventory.packages import TOOLKIT
from tests.faults.healing import CARD, LOSE_GPU
from tests.verify.conftest import matches

NODE, GUEST = "pve1", "gpu01"


@dataclass(frozen=True)
class Breakage:
    """One broken promise. `check`: the id that is about it; `breaks` and `mends`: scripts on the host `on`.

    Declared and not deployed instead: `declares`, a dotted key of the node or guest `on` with its value.
    """

    check: str
    breaks: str = ""
    mends: str = ""
    on: str = GUEST
    declares: tuple[str, Any] | None = None
    #: Other ids that promise the same.
    besides: tuple[str, ...] = ()
    #: Patterns of ids that can't be judged then.
    unseen: tuple[str, ...] = ()
    #: Script on the guest that waits for what comes back after that.
    back: str = ""
    #: More words for verify.
    words: tuple[str, ...] = ()

    @property
    def typical(self) -> bool:
        """Does it stand for others like it?"""
        return self.check in TYPICAL

    @property
    def failing(self) -> set[str]:
        """`id[host]` of the checks that fail."""
        return {labelled(id_) for id_ in (self.check, *self.besides)}


def labelled(id_: str) -> str:
    """The id with the host that it is of."""
    of_node = id_.startswith("hypervisor.") or id_ in ("vm.api.reachable", "vm.undeclared")
    return f"{id_}[{NODE if of_node else GUEST}]"


def wrong(case: Breakage, failed: Iterable[str], unseen: Iterable[str]) -> list[str]:
    """What is otherwise than declared, in words. `failed`: `id[host]` of what failed; `unseen`: of what was not run
    though the healthy lab runs it.
    """
    failed, unseen = set(failed), {each.partition("[")[0] for each in unseen}
    told = [f"{each} does not fail" for each in sorted(case.failing - failed)]
    told += [f"{each} fails, too" for each in sorted(failed - case.failing)]
    told += [
        f"{each} is not run"
        for each in sorted(unseen)
        if not any(fnmatchcase(each, pattern) for pattern in case.unseen)
    ]
    told += [
        f"nothing like {pattern} is left out"
        for pattern in case.unseen
        if not any(fnmatchcase(each, pattern) for each in unseen)
    ]
    return told


def card(*lines: str) -> tuple[str, str]:
    """The card answers otherwise; see rehearsal/nvidia/source/gpu.h."""
    return f"printf '%s\\n' {' '.join(lines)} > {CARD}", f"rm -f {CARD}"


def edited(path: str, *expressions: str, then: str = "true") -> tuple[str, str]:
    """A file that sed has changed; `then` is done after the change and after its end."""
    words = " ".join(f"-e '{each}'" for each in expressions)
    # Elsewhere: beside it, whatever reads the folder would read that, too.
    kept = f"/run/kept-{path.rpartition('/')[2]}"
    return f"cp -p {path} {kept}\nsed -i {words} {path}\n! cmp -s {path} {kept}\n{then}", f"mv {kept} {path}\n{then}"


def away(path: str) -> tuple[str, str]:
    return f"mv {path} {path}.away", f"mv {path}.away {path}"


def covered(path: str, text: str) -> tuple[str, str]:
    """A file of the kernel's that says something else."""
    return f"cat > /run/covered <<'END'\n{text}\nEND\nmount --bind /run/covered {path}", f"umount {path}"


def milvus(body: str) -> str:
    """Python with `A`, root's client of the tenant's database, and `login`."""
    return f"""/opt/gpulab/milvus-tools/bin/python - <<'END'
import json
from pymilvus import MilvusClient
login = json.load(open("/etc/gpulab/milvus.root.json"))
def client(password=login["password"]):
    return MilvusClient(login["uri"], token="root:" + password, db_name="astro", timeout=30)
A = client()
{body}
END"""


def image(name: str) -> str:
    """Says how the lab's image of that service is called."""
    return f"docker image ls --digests --format '{{{{.Repository}}}}@{{{{.Digest}}}}' | grep lab/{name}"


def index(**params: object) -> str:
    """The collection with an index of these parameters beside its own."""
    given = {"metric_type": "L2", "M": 16} | params
    return milvus(f"""A.release_collection("spectra")
A.drop_index("spectra", A.list_indexes("spectra")[0])
made = A.prepare_index_params()
made.add_index("vector", index_type="HNSW", metric_type={given["metric_type"]!r},
               params={{"M": {given["M"]}, "efConstruction": 200}})
A.create_index("spectra", made)
A.load_collection("spectra")""")


def toolkit(version: str) -> str:
    named = " ".join(f"{name}={version}" for name in TOOLKIT)
    return f"apt-get install -y -q --allow-downgrades --allow-change-held-packages {named}"


def until(command: str) -> str:
    """Wait for that, at most two minutes."""
    return f"timeout 120 bash -c 'until {command}; do sleep 0.3; done' > /dev/null 2>&1"


#: A client of the card that holds so many MiB until it is ended. MPS' folder lets in the service's user, and root.
HOLD = r"""cat > /run/hold.py <<'END'
import ctypes, sys, time
cuda = ctypes.CDLL("libcuda.so.1")
context, memory, device = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_int()
def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    if code:
        sys.exit(f"{name}: {code}")
call("cuInit", 0)
call("cuDeviceGet", ctypes.byref(device), 0)
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
call("cuCtxSetCurrent", context)
call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(int(sys.argv[1]) << 20))
open("/tmp/held", "w").close()
time.sleep(600)
END
rm -f /tmp/held
"""


def holds(mib: int, uid: int, group_of: str = "") -> tuple[str, str]:
    """A process of that user holds memory of the card, in the control groups of a container where one is named."""
    moved = f"""pid=$(docker inspect --format '{{{{.State.Pid}}}}' {group_of})
while IFS=: read -r number kinds path; do
    for folder in /sys/fs/cgroup /sys/fs/cgroup/unified "/sys/fs/cgroup/${{kinds#name=}}"; do
        if [ -e "$folder$path/cgroup.procs" ]; then cat /run/hold.pid > "$folder$path/cgroup.procs" || true; fi
    done
done < /proc/$pid/cgroup"""
    begun = f"""{HOLD}env CUDA_MPS_PIPE_DIRECTORY=/run/nvidia-mps setpriv --reuid={uid} --regid={uid} --clear-groups \\
    python3 /run/hold.py {mib} > /run/hold.log 2>&1 &
echo $! > /run/hold.pid
{until("test -e /tmp/held || ! kill -0 $(cat /run/hold.pid)")}
test -e /tmp/held || {{ cat /run/hold.log; exit 1; }}"""
    ended = "kill $(cat /run/hold.pid)\n" + until("! kill -0 $(cat /run/hold.pid)") + "\nrm -f /tmp/held"
    return (f"{begun}\n{moved}" if group_of else begun), ended


#: Nobody restarts a service, and the timer goes on.
QUIET = """folder=/run/systemd/system/gpulab-heal.service.d
mkdir -p $folder
printf '[Service]\\nExecStart=\\nExecStart=touch /var/lib/gpulab/heal/look.json\\n' > $folder/quiet.conf
systemctl daemon-reload
"""
LOUD = "\nrm -r /run/systemd/system/gpulab-heal.service.d\nsystemctl daemon-reload"
OLLAMA_ANSWERS = until("curl -sf http://127.0.0.1:11434/api/version")
#: It searches later than it calls itself healthy.
MILVUS_ANSWERS = f"""cat > /run/ask.py <<'END'
import json
from pymilvus import MilvusClient
login = json.load(open("/etc/gpulab/milvus.root.json"))
client = MilvusClient(login["uri"], token="root:" + login["password"], db_name="astro", timeout=5)
client.search("spectra", data=[[0.0] * 128], anns_field="vector", limit=1)
END
{until("/opt/gpulab/milvus-tools/bin/python /run/ask.py")}"""
SPECIFICATION = "/var/run/cdi/nvidia.yaml"
CONTROL = "CUDA_MPS_PIPE_DIRECTORY=/run/nvidia-mps nvidia-cuda-mps-control"
PCI = "/sys/bus/pci/devices"
GRUB = "/boot/grub/grub.cfg"
SCRIPT = "/etc/initramfs-tools/scripts/init-top/gpulab-vfio"
REBUILD = "update-initramfs -u -k all"
#: Containers that stop with the engine.
MORTAL = edited(
    "/etc/docker/daemon.json",
    's/"live-restore": true/"live-restore": false/',
    then="systemctl reload docker\nsleep 1",
)
RESTART_NGINX = "systemctl reload nginx\nsleep 0.5"
PROXY = "/etc/nginx/conf.d/gpulab.conf"
JOBS = ("containers.pytorch.environment", "containers.pytorch.limits", "containers.pytorch.rights")
#: Nothing of the card can be seen.
CARDLESS = ("nvidia.gpu.*", "nvidia.mps.*")
#: What is about the card in containers.
IN_CONTAINERS = (
    "containers.*.running",
    "containers.*.gpu_visible",
    "containers.*.budget",
    "containers.card.foreign",
    "containers.cdi",
    "containers.cdi.fresh",
    "containers.gpu.daemon_reload",
    "containers.healing",
    "containers.ollama.gpu",
    "containers.milvus.gpu",
)
OF_A_SERVICE = ("gpu_visible", "loopback", "hardening")


def of(service: str, *names: str) -> tuple[str, ...]:
    return tuple(f"containers.{service}.{name}" for name in names)


OF_THE_NODE = [
    Breakage(
        "hypervisor.reachable",
        "systemctl stop ssh.socket ssh.service",
        "systemctl start ssh.service",
        NODE,
        unseen=("hypervisor.*", "vm.backup.*"),
    ),
    Breakage(
        "hypervisor.pve_version", *covered("/usr/bin/pveversion", "#!/bin/sh\necho pve-manager/7.4-3/9002ab8a"), NODE
    ),
    Breakage(
        "hypervisor.iommu.on",
        "mkdir -p /run/empty\nmount --bind /run/empty /sys/class/iommu",
        "umount /sys/class/iommu",
        NODE,
    ),
    Breakage(
        "hypervisor.cmdline",
        "sed s/iommu=pt// /proc/cmdline > /run/covered\nmount --bind /run/covered /proc/cmdline",
        "umount /proc/cmdline",
        NODE,
    ),
    Breakage(
        "hypervisor.kernel",
        declares=("passthrough.kernel", "6.17.2-1-pve"),
        on=NODE,
        besides=("hypervisor.next_boot.kernel",),
    ),
    Breakage(
        "hypervisor.device",
        f"cd {PCI}/0000:01:00.0\ncp -p device /run/device\necho 0x2531 > device",
        f"cp -p /run/device {PCI}/0000:01:00.0/device",
        NODE,
        unseen=("hypervisor.next_boot.initramfs",),
    ),
    Breakage(
        "hypervisor.vfio.bound",
        f"ln -sfn ../../drivers/snd_hda_intel {PCI}/0000:01:00.1/driver",
        f"ln -sfn ../../drivers/vfio-pci {PCI}/0000:01:00.1/driver",
        NODE,
    ),
    Breakage(
        "hypervisor.iommu.group",
        f"cd {PCI}/0000:02:00.0\nreadlink iommu_group > /run/group\n"
        "ln -sfn ../../../../kernel/iommu_groups/14 iommu_group",
        f'ln -sfn "$(cat /run/group)" {PCI}/0000:02:00.0/iommu_group',
        NODE,
    ),
    Breakage(
        "hypervisor.reset",
        declares=("passthrough.devices.0.reset_methods", ["bus"]),
        on=NODE,
    ),
    Breakage(
        "hypervisor.options",
        "cp -p /sys/module/vfio_pci/parameters/disable_idle_d3 /run/d3\n"
        "echo Y > /sys/module/vfio_pci/parameters/disable_idle_d3",
        "cp -p /run/d3 /sys/module/vfio_pci/parameters/disable_idle_d3",
        NODE,
    ),
    Breakage(
        "hypervisor.blacklist",
        declares=("passthrough.blacklist", ["nouveau"]),
        on=NODE,
        besides=("hypervisor.next_boot.initramfs",),
    ),
    Breakage(
        "hypervisor.hugepages",
        declares=("passthrough.hugepages", {"size": "2M", "count": 4}),
        on=NODE,
        besides=("hypervisor.cmdline", "hypervisor.next_boot.cmdline"),
    ),
    Breakage(
        "hypervisor.next_boot.kernel",
        "echo 6.17.2-1-pve > /etc/kernel/proxmox-boot-pin",
        "rm /etc/kernel/proxmox-boot-pin",
        NODE,
    ),
    Breakage("hypervisor.next_boot.cmdline", *edited(GRUB, "s/ iommu=pt//"), NODE),
    Breakage("hypervisor.next_boot.initramfs", *edited(SCRIPT, "s/10de:24b0/10de:ffff/", then=REBUILD), NODE),
    Breakage("hypervisor.reboot_pending", *edited(GRUB, "s/ iommu=pt/ iommu=pt mitigations=off/"), NODE),
]

OF_THE_VM = [
    Breakage(
        "vm.api.reachable",
        "pveum user modify gpulab@pve --enable 0",
        "pveum user modify gpulab@pve --enable 1",
        NODE,
        unseen=("vm.undeclared", "vm.[!au]*", "vm.agent"),
    ),
    Breakage(
        "vm.undeclared",
        "pvesh create /nodes/pve1/qemu --vmid 555 --tags gpulab --memory 64",
        "pvesh delete /nodes/pve1/qemu/555",
        NODE,
    ),
    Breakage(
        "vm.backup.job",
        "pvesh set /cluster/backup/gpulab-gpu01 --enabled 0",
        "pvesh set /cluster/backup/gpulab-gpu01 --enabled 1",
        NODE,
    ),
    Breakage("vm.backup.age", declares=("backup.max_age_h", 0.001)),
    Breakage("vm.exists", "qm set 101 --tags mine", "qm set 101 --tags gpulab", NODE, besides=("vm.labels",)),
    Breakage("vm.agent", "qm set 101 --agent enabled=0", "qm set 101 --agent enabled=1", NODE),
    Breakage("vm.onboot", "qm set 101 --onboot 0", "qm set 101 --onboot 1", NODE),
    Breakage(
        "vm.cloudinit",
        "qm config 101 | sed -n 's/^nameserver: //p' > /run/servers\nqm set 101 --nameserver 192.0.2.53",
        'qm set 101 --nameserver "$(cat /run/servers)"',
        NODE,
    ),
    Breakage("vm.protection", "qm set 101 --protection 0", "qm set 101 --protection 1", NODE),
    Breakage("vm.labels", "qm set 101 --tags 'gpulab;mine'", "qm set 101 --tags gpulab", NODE),
    Breakage("vm.numa", declares=("numa", True)),
    Breakage("vm.startup", declares=("startup", {"order": 3})),
    Breakage("vm.cores", declares=("cores", 3)),
    Breakage("vm.memory", declares=("memory_mib", 3072)),
    Breakage("vm.machine", declares=("machine", "pc-q35-9.2")),
    Breakage("vm.pinning", declares=("affinity", "0-1"), unseen=("vm.pinning.cpus",)),
    Breakage("vm.network", declares=("bridge", "vmbr7")),
    Breakage("vm.cpu_type", declares=("cpu_type", "x86-64-v3")),
    Breakage("vm.disks", declares=("system_disk_gib", 20)),
    Breakage("vm.disks.storage", declares=("disk_storage", "local")),
    Breakage(
        "vm.disks.options",
        "qm config 101 | sed -n 's/^scsi1: //p' > /run/scsi1\n"
        'qm set 101 --scsi1 "$(sed "s/,size=[^,]*//" /run/scsi1),backup=0"',
        'qm set 101 --scsi1 "$(sed "s/,size=[^,]*//" /run/scsi1)"',
        NODE,
    ),
    Breakage(
        "vm.mapping",
        "pvesh set /cluster/mapping/pci/a4000 --map id=10de:24b0,node=pve1,path=0000:02:00",
        "pvesh set /cluster/mapping/pci/a4000 --map "
        "id=10de:24b0,iommugroup=14,node=pve1,path=0000:01:00,subsystem-id=10de:14ad",
        NODE,
    ),
    Breakage("vm.pending", "qm set 101 --localtime 1", "qm set 101 --delete localtime", NODE),
]

OF_THE_SYSTEM = [
    Breakage(
        "system.reachable",
        "systemctl stop ssh.socket ssh.service",
        "systemctl start ssh.service",
        unseen=("system.*", "nvidia.*", "containers.*"),
    ),
    Breakage(
        "system.address",
        "address=$(ip -o -4 address show dev host0 | grep -o '10[0-9./]*/24')\n"
        'echo "$address" > /run/address\nip address add "${address%/24}/25" dev host0\n'
        'ip address del "$address" dev host0',
        'address=$(cat /run/address)\nip address add "$address" dev host0\n'
        'ip address del "${address%/24}/25" dev host0\n'
        "networkctl reconfigure host0\n" + until("ip route | grep -q ^default"),
    ),
    Breakage(
        "system.data_disk",
        "systemctl stop gpulab-heal.timer\n"
        + until("[ $(systemctl show --property=ActiveState --value gpulab-heal.service) != activating ]")
        + "\numount --lazy /srv/data\n"
        + until('[ -z "$(docker ps --quiet)" ]'),
        "systemctl start srv-data.mount\n"
        + OLLAMA_ANSWERS
        + "\n"
        + MILVUS_ANSWERS
        + "\nsystemctl start gpulab-heal.timer",
        besides=(
            *(f"containers.{service}.{name}" for service in ("milvus", "ollama") for name in ("running", "storage")),
            "containers.ollama.token.accepted",
            "containers.pytorch.job",
            "containers.healing",
        ),
        unseen=("containers.*", "system.data_disk.*"),
    ),
    Breakage(
        "system.data_disk.beneath",
        "unshare --mount sh -c 'mount --bind /srv /mnt && chattr -i /mnt/data && mkdir /mnt/data/lost'",
        "unshare --mount sh -c 'mount --bind /srv /mnt && rmdir /mnt/data/lost && chattr +i /mnt/data'",
    ),
    Breakage("system.data_disk.size", declares=("data_disk.size_gib", 6), besides=("vm.disks",)),
    Breakage("system.data_disk.fstab", *edited("/etc/fstab", "s/^UUID=[^ ]*/\\/dev\\/sdb/")),
    Breakage(
        "system.packages",
        *edited("/var/lib/dpkg/status", "/^Package: gnupg$/,/^$/s/^Status: .*/Status: deinstall ok config-files/"),
    ),
    Breakage(
        "system.security_upgrades",
        *edited("/etc/apt/apt.conf.d/52gpulab-upgrades", 's/Unattended-Upgrade "1"/Unattended-Upgrade "0"/'),
    ),
]

OF_THE_DRIVER = [
    Breakage("nvidia.driver.versions", *away("/lib/firmware/nvidia/580.105.08")),
    Breakage(
        "nvidia.driver.nouveau",
        "cd /\nmkdir /run/kept\nmv /etc/modprobe.d/gpulab-nouveau.conf "
        "/usr/lib/modprobe.d/nvidia-blacklists-nouveau.conf /run/kept",
        "mv /run/kept/gpulab-nouveau.conf /etc/modprobe.d\n"
        "mv /run/kept/nvidia-blacklists-nouveau.conf /usr/lib/modprobe.d\nrmdir /run/kept",
    ),
    Breakage(
        "nvidia.driver.next_kernel",
        "mkdir -p /boot/grub\ncat > /boot/grub/grub.cfg <<'END'\nset default=\"0\"\nmenuentry 'Debian' {\n"
        "\tlinux /boot/vmlinuz-6.99.0-amd64 root=/dev/sda1 ro\n\tinitrd /boot/initrd.img-6.99.0-amd64\n}\nEND",
        "rm -r /boot/grub",
    ),
    Breakage("nvidia.driver.held", "apt-mark unhold nvidia-driver-cuda", "apt-mark hold nvidia-driver-cuda"),
    Breakage("nvidia.driver.unattended", *away("/etc/apt/apt.conf.d/52gpulab-nvidia")),
    Breakage("nvidia.cuda", declares=("nvidia.cuda", ["12.4"])),
    Breakage("nvidia.driver.branch", declares=("nvidia.version", "580.95.05"), besides=("nvidia.driver.pin",)),
    Breakage("nvidia.driver.pin", *away("/etc/apt/preferences.d/gpulab-nvidia")),
    Breakage(
        "nvidia.toolkit.version",
        toolkit("1.19.1-1"),
        toolkit("1.20.0-1"),
    ),
    Breakage(
        "nvidia.repository.signed",
        *edited("/etc/apt/sources.list.d/gpulab-nvidia.sources", "s/^Signed-By:.*/Trusted: yes/"),
    ),
]

OF_THE_CARD = [
    Breakage("nvidia.gpu.visible", *card("lost=1"), unseen=(*CARDLESS, *IN_CONTAINERS)),
    Breakage("nvidia.gpu.memory", *card("memory_total_mib=15000")),
    Breakage(
        "nvidia.gpu.client",
        "chown root:root /run/nvidia-mps",
        "chown --reference=/run/nvidia-mps/log /run/nvidia-mps",
        # Ollama, too, is a client.
        besides=("containers.ollama.gpu",),
        unseen=tuple(f"nvidia.gpu.{name}" for name in ("clocks", "link", "link.generation", "throttle")),
    ),
    Breakage("nvidia.gpu.link", *card("link_width=8")),
    Breakage("nvidia.gpu.link.generation", *card("link_generation=2")),
    Breakage(
        "nvidia.gpu.replay",
        "(n=0; while sleep 0.1; do n=$((n + 1)); echo replay_count=$n > /var/lib/lab-hardware/new; "
        f"mv /var/lib/lab-hardware/new {CARD}; done) > /dev/null 2>&1 &\necho $! > /run/replay.pid",
        f"kill $(cat /run/replay.pid)\nsleep 0.3\nrm -f {CARD}",
    ),
    Breakage("nvidia.gpu.throttle", *card("event_reasons=0x80")),
    Breakage(
        "nvidia.gpu.temperature",
        # Or the policy takes its power, which is another promise.
        "systemctl kill --signal=STOP gpulab-gpu-thermal\n" + card("temperature_c=92", "event_reasons=0")[0],
        f"rm -f {CARD}\nsystemctl kill --signal=CONT gpulab-gpu-thermal",
    ),
    Breakage("nvidia.gpu.thermal", "systemctl stop gpulab-gpu-thermal", "systemctl start gpulab-gpu-thermal"),
    Breakage("nvidia.gpu.settings", "systemctl disable gpulab-gpu-settings", "systemctl enable gpulab-gpu-settings"),
    Breakage("nvidia.gpu.power_limit", "nvidia-smi --power-limit=130", "nvidia-smi --power-limit=120"),
    Breakage("nvidia.gpu.clocks", *card("sm_clock_mhz=2000")),
    Breakage("nvidia.gpu.ecc", declares=("nvidia.ecc", True)),
    Breakage("nvidia.gpu.compute_mode", "nvidia-smi --compute-mode=0", "nvidia-smi --compute-mode=3"),
    Breakage("nvidia.gpu.accounting", "nvidia-smi --accounting-mode=0", "nvidia-smi --accounting-mode=1"),
    Breakage("nvidia.gpu.persistence", "nvidia-smi --persistence-mode=0", "nvidia-smi --persistence-mode=1"),
    Breakage("nvidia.gpu.memory_health", *card("remapped_failure=1")),
    Breakage(
        "nvidia.gpu.xid",
        "logger --tag kernel 'NVRM: Xid (PCI:0000:01:00): 62, pid=1, it does not count'\nsleep 0.3",
        "journalctl --rotate\njournalctl --vacuum-time=1ms",
    ),
]

OF_MPS = [
    Breakage("nvidia.mps.daemon", "systemctl disable gpulab-mps", "systemctl enable gpulab-mps"),
    Breakage(
        "nvidia.mps.limits",
        f"echo set_default_active_thread_percentage 5 | {CONTROL}",
        f"echo set_default_active_thread_percentage 80 | {CONTROL}",
    ),
    Breakage("nvidia.mps.closed", "chmod 755 /run/nvidia-mps", "chmod 700 /run/nvidia-mps"),
    Breakage("nvidia.mps.tenants", *edited("/etc/gpulab/tenants/ml.env", "s/PERCENTAGE=40/PERCENTAGE=90/")),
    Breakage("nvidia.mps.uid", *holds(64, uid=0), besides=("containers.card.foreign",)),
    Breakage(
        "nvidia.mps.off",
        declares=("nvidia.sharing", "time-slice"),
        besides=(
            "nvidia.gpu.compute_mode",
            "containers.ollama.hardening",
            "containers.milvus.hardening",
            "containers.pytorch.limits",
        ),
    ),
]

OF_THE_ENGINE = [
    Breakage(
        "containers.engine.active",
        QUIET + "systemctl stop docker.socket docker.service",
        f"systemctl start docker.socket docker.service\n{OLLAMA_ANSWERS}\n{MILVUS_ANSWERS}{LOUD}",
        # The services run on, and what hands their ports on has ended with the engine.
        besides=("containers.ollama.token.accepted",),
        unseen=("containers.*",),
    ),
    Breakage(
        "containers.cdi",
        *away(SPECIFICATION),
        besides=("containers.pytorch.job",),
        unseen=(*JOBS, "containers.cdi.fresh", "containers.gpu.daemon_reload"),
    ),
    Breakage(
        "containers.cdi.fresh",
        # As after a driver that was upgraded; what is started from now on looks for the files of the one before.
        # Written in place both times: Docker does not see a file that is moved into its folder.
        f"cp {SPECIFICATION} /run/specification\nsed s/580[.]105[.]08/575.57.08/ /run/specification > {SPECIFICATION}",
        f"cat /run/specification > {SPECIFICATION}",
        besides=("containers.pytorch.job", "containers.gpu.daemon_reload"),
        unseen=JOBS,
    ),
    Breakage(
        "containers.gpu.daemon_reload",
        "mkdir -p /run/systemd/system-generators\ncat > /run/systemd/system-generators/thief <<'END'\n#!/bin/bash\n"
        "for process in $(pgrep --full '^sleep 300$'); do rm -f /proc/$process/root/dev/nvidiactl; done\n"
        "END\nchmod +x /run/systemd/system-generators/thief",
        "rm /run/systemd/system-generators/thief",
    ),
    Breakage(
        "containers.gpu.engine_restart",
        *edited(
            "/etc/docker/daemon.json",
            's/"live-restore": true/"live-restore": false/',
            then="systemctl reload docker\nsleep 1",
        ),
    ),
    Breakage("containers.healing", "systemctl disable gpulab-heal.timer", "systemctl enable gpulab-heal.timer"),
    Breakage(
        "containers.data_disk.folders",
        "docker create --name probe --label org.gpulab.service=probe --volume /srv-other:/data "
        "$(docker inspect --format '{{.Image}}' ollama)",
        "docker rm --force probe\nrm -rf /srv-other",
    ),
    Breakage(
        "containers.data_disk.bound",
        *edited(
            "/etc/systemd/system/gpulab-data-disk.service",
            "/^BindsTo=/d",
            "/^RequiresMountsFor=/d",
            then="systemctl daemon-reload",
        ),
    ),
    Breakage("containers.card.foreign", *holds(64, uid=850)),
]

OF_ACCESS = [
    Breakage("containers.access.nginx", "systemctl disable nginx", "systemctl enable nginx"),
    Breakage(
        "containers.ollama.tls",
        "cp -rp /etc/nginx/gpulab /run/proxy\n"
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=gpu01 -days 90 "
        "-keyout /etc/nginx/gpulab/server.key -out /etc/nginx/gpulab/server.pem 2> /dev/null\n" + RESTART_NGINX,
        "cp -p /run/proxy/server.* /etc/nginx/gpulab\nrm -r /run/proxy\n" + RESTART_NGINX,
        besides=("containers.milvus.tls",),
        unseen=("containers.ollama.token.*", "containers.ollama.managing", "containers.access.log"),
    ),
    Breakage(
        "containers.ollama.token.required",
        *edited(PROXY, '/gpulab_ollama_tenant {/,/}/s/default "";/default "nobody";/', then=RESTART_NGINX),
    ),
    Breakage(
        "containers.ollama.token.accepted",
        *edited("/etc/nginx/gpulab/ollama.tenants", "/ ml;$/d", then=RESTART_NGINX),
    ),
    Breakage(
        "containers.ollama.managing",
        *edited(
            PROXY, "s/location = \\/api\\/ps {/location = \\/api\\/pull { return 200; }\\n    &/", then=RESTART_NGINX
        ),
    ),
    Breakage(
        "containers.access.ports",
        "python3 -m http.server 8088 > /dev/null 2>&1 &\necho $! > /run/open.pid\n" + until("curl -s 127.0.0.1:8088"),
        "kill $(cat /run/open.pid)",
    ),
    Breakage(
        "containers.access.log",
        "chmod 644 /var/log/nginx/gpulab.log",
        "chmod 640 /var/log/nginx/gpulab.log",
    ),
    Breakage(
        "containers.access.secrets",
        "chmod 644 /etc/nginx/gpulab/server.key",
        "chmod 600 /etc/nginx/gpulab/server.key",
    ),
]

OF_SERVICES = [
    Breakage(
        "containers.ollama.running",
        "docker stop ollama",
        "docker start ollama\n" + OLLAMA_ANSWERS,
        # The proxy lets its tenants in, and then there is nobody to answer.
        besides=("containers.ollama.token.accepted",),
        unseen=(
            *of("ollama", *OF_A_SERVICE, "api", "models", "gpu", "settings", "context", "memory"),
            "containers.access.log",
        ),
    ),
    Breakage(
        "containers.ollama.image",
        f"{image('ollama')} > /run/image\ndocker rmi --force --no-prune $(cat /run/image)",
        "docker pull --quiet $(cat /run/image)",
    ),
    Breakage(
        "containers.milvus.gpu_visible",
        QUIET + LOSE_GPU.replace("ollama", "milvus"),
        "docker restart milvus\n" + MILVUS_ANSWERS + LOUD,
    ),
    Breakage(
        "containers.milvus.storage",
        "mount -t tmpfs none /srv/data/milvus",
        "umount /srv/data/milvus",
        besides=("containers.data_disk.folders",),
    ),
    Breakage(
        "containers.milvus.loopback",
        "python3 -m http.server --bind $(hostname -I | cut -d' ' -f1) 9091 > /dev/null 2>&1 &\n"
        "echo $! > /run/open.pid\nsleep 1",
        "kill $(cat /run/open.pid)",
        besides=("containers.access.ports",),
    ),
    Breakage(
        "containers.ollama.hardening",
        "docker network connect bridge ollama",
        "docker network disconnect bridge ollama",
    ),
    Breakage("containers.milvus.budget", *holds(3200, uid=850, group_of="milvus")),
    Breakage(
        "containers.ollama.api",
        QUIET + "iptables -I OUTPUT -p tcp --dport 11434 -j REJECT --reject-with tcp-reset",
        "iptables -D OUTPUT -p tcp --dport 11434 -j REJECT --reject-with tcp-reset" + LOUD,
        besides=("containers.ollama.token.accepted",),
        unseen=(*of("ollama", "models", "gpu", "context", "memory"), "containers.access.log"),
    ),
    Breakage(
        "containers.ollama.models",
        *away("/srv/data/ollama/models/manifests"),
        unseen=of("ollama", "gpu", "context", "memory"),
    ),
    Breakage("containers.ollama.settings", declares=("services.ollama.max_queue", 17)),
    Breakage(
        "containers.ollama.context",
        declares=("services.ollama.context_length", 2048),
        besides=("containers.ollama.settings",),
    ),
    Breakage(
        "containers.ollama.gpu",
        QUIET + LOSE_GPU,
        "docker restart ollama\n" + OLLAMA_ANSWERS + LOUD,
        besides=("containers.ollama.gpu_visible",),
    ),
]

OF_MILVUS = [
    Breakage(
        "containers.milvus.healthy",
        QUIET + "iptables -I OUTPUT -p tcp --dport 9091 -j REJECT --reject-with tcp-reset",
        "iptables -D OUTPUT -p tcp --dport 9091 -j REJECT --reject-with tcp-reset" + LOUD,
        unseen=("containers.milvus.*",),
    ),
    Breakage(
        "containers.milvus.authorization",
        milvus('A.update_password("root", login["password"], "Milvus")'),
        milvus('client("Milvus").update_password("root", "Milvus", login["password"])').replace("A = client()\n", ""),
    ),
    Breakage(
        "containers.milvus.tenants",
        milvus('A.create_role("other")\nA.grant_role("ml", "other")'),
        milvus('A.revoke_role("ml", "other")\nA.drop_role("other")'),
    ),
    Breakage(
        "containers.milvus.isolation",
        milvus('A.grant_privilege("gpulab_ml", "Collection", "Query", "*", db_name="astro")'),
        milvus('A.revoke_privilege("gpulab_ml", "Collection", "Query", "*", db_name="astro")'),
    ),
    Breakage(
        "containers.milvus.collections",
        milvus('A.release_collection("spectra")'),
        milvus('A.load_collection("spectra")'),
        unseen=("containers.milvus.answers",),
    ),
    Breakage("containers.milvus.indexes", index(M=24), index()),
    Breakage(
        "containers.milvus.answers",
        index(metric_type="IP"),
        index(),
        besides=("containers.milvus.indexes",),
    ),
    Breakage("containers.milvus.profiles", *edited("/etc/gpulab/milvus.json", "0,/128/s//64/")),
]

OF_JOBS = [
    Breakage(
        "containers.pytorch.image",
        f"{image('pytorch')} > /run/image\ndocker tag $(cat /run/image) kept\ndocker rmi --no-prune $(cat /run/image)",
        "docker pull --quiet $(cat /run/image)\ndocker rmi --no-prune kept",
        besides=("containers.pytorch.job",),
        unseen=JOBS,
    ),
    Breakage("containers.pytorch.job", *away("/usr/local/bin/gpulab-run"), unseen=JOBS),
    Breakage(
        "containers.pytorch.environment",
        "file=$(ls /srv/data/pytorch/environments/current/lib/python3*/site-packages/einops/einops.py)\n"
        'echo "$file" > /run/changed\ncp -p "$file" /run/kept.py\necho "# changed" >> "$file"',
        'cp -p /run/kept.py "$(cat /run/changed)"',
    ),
    Breakage("containers.pytorch.limits", *edited("/etc/gpulab/pytorch.json", "0,/4096M/s//8192M/")),
    Breakage("containers.pytorch.rights", *edited("/etc/gpulab/pytorch.json", 's/"uid": 850/"uid": 851/')),
]

#: The guest has booted, and its services answer.
BOOTED = "\n".join(
    [until('systemctl is-system-running --wait | grep -E "running|degraded"'), OLLAMA_ANSWERS, MILVUS_ANSWERS]
)

#: What takes the lab apart, and comes last.
HEAVY = [
    Breakage(
        "nvidia.driver.loaded",
        # Nobody can unload a module that is in use, so its users are stopped first.
        QUIET
        + "docker stop ollama milvus\nsystemctl stop gpulab-mps gpulab-gpu-thermal nvidia-persistenced\n"
        + "rmmod nvidia_uvm nvidia",
        "modprobe nvidia\nmodprobe nvidia_uvm\nsystemctl start nvidia-persistenced gpulab-mps gpulab-gpu-thermal\n"
        "systemctl restart gpulab-gpu-settings\nsystemctl start nvidia-cdi-refresh\ndocker start ollama milvus\n"
        f"{OLLAMA_ANSWERS}\n{MILVUS_ANSWERS}{LOUD}",
        besides=("containers.ollama.token.accepted",),
        unseen=(*CARDLESS, "containers.*"),
    ),
    Breakage(
        "containers.data_disk.required",
        "systemctl stop gpulab-heal.timer\nsystemctl stop srv-data.mount\n"
        + until('[ -z "$(docker ps --quiet)" ]')
        + "\nchattr -i /srv/data\nmkdir /srv/data/x\n"
        "docker run --detach --name probe --label org.gpulab.service=probe --volume=/srv/data/x:/data "
        "$(docker inspect --format '{{.Image}}' ollama)",
        "docker rm --force probe\nrmdir /srv/data/x\nchattr +i /srv/data\nsystemctl start srv-data.mount\n"
        + OLLAMA_ANSWERS
        + "\n"
        + MILVUS_ANSWERS
        + "\nsystemctl start gpulab-heal.timer",
        besides=(
            "system.data_disk",
            "system.data_disk.beneath",
            *(f"containers.{service}.{name}" for service in ("milvus", "ollama") for name in ("running", "storage")),
            "containers.ollama.token.accepted",
            "containers.pytorch.job",
            "containers.healing",
        ),
        unseen=("containers.*", "system.data_disk.*"),
    ),
    Breakage(
        "containers.gpu.engine_restart.real",
        *edited(
            "/etc/docker/daemon.json",
            's/"live-restore": true/"live-restore": false/',
            then="systemctl reload docker\nsleep 1",
        ),
        besides=("containers.gpu.engine_restart",),
        words=("--disruptive",),
    ),
    *(
        # What QEMU was started with, as it is changed: while the VM is off.
        Breakage(
            f"vm.{name}",
            f"qm stop 101\n{breaks}",
            f"{mends}\nqm start 101",
            NODE,
            back=BOOTED,
            besides=("vm.running", "system.reachable"),
            unseen=("vm.agent", "system.*", "nvidia.*", "containers.*"),
        )
        for name, breaks, mends in (
            ("hardware", "qm set 101 --bios seabios", "qm set 101 --bios ovmf"),
            ("gpu", "qm set 101 --delete hostpci0", "qm set 101 --hostpci0 mapping=a4000,pcie=1"),
        )
    ),
    Breakage(
        "vm.running",
        "qm stop 101",
        "qm start 101",
        NODE,
        back=BOOTED,
        besides=("system.reachable",),
        unseen=("vm.agent", "system.*", "nvidia.*", "containers.*"),
    ),
]

CASES = [
    *OF_THE_NODE,
    *OF_THE_VM,
    *OF_THE_SYSTEM,
    *OF_THE_DRIVER,
    *OF_THE_CARD,
    *OF_MPS,
    *OF_THE_ENGINE,
    *OF_ACCESS,
    *OF_SERVICES,
    *OF_MILVUS,
    *OF_JOBS,
    *HEAVY,
]

#: Why a check is not broken here, in words. Each that is not among CASES has its reason.
REASONS = {
    "system.time": "the lab's hosts share this machine's clock",
    "vm.pinning.cpus": "the lab's VMs have no process of QEMU",
    "vm.pinning.pages": "the lab's VMs have no process of QEMU",
    "nvidia.mps.server": "needs a real GPU: the simulated one runs no code, so MPS' server ends at once",
    "containers.engine.version": "the lab has one version of each engine, which is new enough",
    "containers.ollama.memory": "the lab's only model is smaller than the least budget that can be declared",
    "containers.milvus.gpu": "needs a real GPU: the lab's Milvus is built for the CPU",
    "containers.pytorch.cuda": "needs a real GPU: the lab's PyTorch is built for the CPU",
    "benchmarks.gpu.answers": "needs a real GPU",
    "benchmarks.gpu.memory.pattern": "needs a real GPU",
    "benchmarks.gpu.{figure}": "needs a real GPU",
    "benchmarks.{mps_figure}": "needs a real GPU",
    "benchmarks.mps.limit": "needs a real GPU",
    "benchmarks.{pytorch_figure}": "judged by a baseline of five runs, see tests/benchmarks",
    "benchmarks.{ollama_figure}": "judged by a baseline of five runs, see tests/benchmarks",
    "benchmarks.{milvus_figure}": "judged by a baseline of five runs, see tests/benchmarks",
}
#: A dozen that stand for others like them.
TYPICAL = {
    "hypervisor.vfio.bound",
    "hypervisor.next_boot.cmdline",
    "vm.backup.job",
    "vm.labels",
    "system.data_disk.fstab",
    "nvidia.driver.pin",
    "nvidia.gpu.throttle",
    "nvidia.mps.limits",
    "containers.gpu.engine_restart",
    "containers.access.secrets",
    "containers.ollama.hardening",
    "containers.milvus.collections",
}
#: The table of the run, for its end.
TABLE: list[str] = []


def reasonless(promised: Iterable[str]) -> list[str]:
    """What is wrong with CASES and REASONS, in words; `promised`: the ids of all checks, with places for parts."""
    promised = set(promised)
    broken = {each for each in promised if any(is_of(each, case.check, promised) for case in CASES)}
    told = [f"{each} has neither a breakage nor a reason" for each in sorted(promised - broken - REASONS.keys())]
    told += [f"{each} is broken, and has a reason not to be" for each in sorted(broken & REASONS.keys())]
    told += [f"{each} is no check" for each in sorted(REASONS.keys() - promised)]
    cases = {case.check for case in CASES}
    return told + [
        f"{each} is no check" for each in sorted(cases) if not any(is_of(name, each, promised) for name in promised)
    ]


def is_of(promised: str, id_: str, all_: Iterable[str]) -> bool:
    """Is it the id of that check, and not that of another, which has one of its own?"""
    return matches(promised, id_) and (promised == id_ or id_ not in set(all_))
