# SPDX-License-Identifier: MIT
"""The packages of NVIDIA's two repositories that a compute-only deploy touches: real names, versions and relations.

What they hold is simulated. The module's tools (modprobe, rmmod, lsmod, modinfo, dkms) are put in front of the real
ones by diversion, and pass on whatever is not about NVIDIA's module. Real are the MPS daemon and the module's source,
which does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rehearsal.nvidia.deb import File, Link, Package, text

SOURCE = Path(__file__).parent / "source"
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
HOME = "/usr/lib/nvidia-simulated"
UNITS = "/usr/lib/systemd/system"

#: Driver versions of the repository and the CUDA version that each reports (1000 * major + 10 * minor).
DRIVERS = {"580.95.05": 13000, "580.105.08": 13000, "590.44.01": 13010}
BRANCHES = ("580", "590")
#: The newest of branch 580 in the repository below `BROKEN` alone, for who asks for it: its module does not build.
BROKEN_DRIVER = ("580.178.99", 13000)
#: CUDA toolkits, and the driver that `cuda` pulls in.
CUDA_TOOLKITS = {"12.9": "12.9.1-1", "13.0": "13.0.2-1", "13.1": "13.1.0-1"}
CUDA_DRIVER = "590.44.01"
TOOLKITS = ("1.19.1-1", "1.20.0-1")

#: Tools that are diverted, and where the real one is started from: kmod looks at the name it was called by.
DIVERTED = {
    "/usr/sbin/modprobe": "modprobe",
    "/usr/sbin/rmmod": "rmmod",
    "/usr/sbin/lsmod": "lsmod",
    "/usr/sbin/modinfo": "modinfo",
    "/usr/bin/lsmod": "lsmod",
    "/usr/sbin/dkms": "dkms",
}

LOAD_UNIT = """\
[Unit]
Description=Load the simulated NVIDIA module, as udev does for a real card
# No udev runs in the lab's guests.
ConditionPathExists=/var/lib/lab-hardware/gpu.json
DefaultDependencies=no
After=local-fs.target systemd-tmpfiles-setup-dev.service lab-gpu.service
Before=sysinit.target nvidia-persistenced.service nvidia-cdi-refresh.service

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/modprobe -a nvidia nvidia_uvm
"""

#: Units that set the card, and may write nowhere else: the real driver is no file, the simulated card's settings are.
SETTING_UNITS = ("gpulab-gpu-settings.service", "gpulab-gpu-thermal.service")
SETTING_DROP_IN = (
    "[Service]\n# simulated: the card's settings are a file.\nReadWritePaths=-/run/lab-gpu -/var/lib/lab-hardware\n"
)

PERSISTENCED_UNIT = """\
[Unit]
Description=NVIDIA Persistence Daemon (simulated)
Wants=syslog.target

[Service]
Type=forking
ExecStart=/usr/bin/nvidia-persistenced --user nvpd
ExecStopPost=/bin/rm -rf /var/run/nvidia-persistenced

[Install]
WantedBy=multi-user.target
"""

REFRESH_UNIT = """\
[Unit]
Description=Refresh NVIDIA CDI specification file (simulated)
ConditionPathExists=/usr/bin/nvidia-smi
ConditionPathExists=/usr/bin/nvidia-ctk
ConditionPathExists=/run/lab-gpu/driver

[Service]
Type=oneshot
Environment=NVIDIA_CTK_CDI_OUTPUT_FILE_PATH=/var/run/cdi/nvidia.yaml
EnvironmentFile=-/etc/nvidia-container-toolkit/nvidia-cdi-refresh.env
ExecStart=/usr/bin/nvidia-ctk cdi generate

[Install]
WantedBy=multi-user.target
"""

REFRESH_PATH_UNIT = """\
[Unit]
Description=Trigger CDI refresh on NVIDIA driver install / uninstall events (simulated)

[Path]
PathChanged=/lib/modules/%v/modules.dep
PathChanged=/lib/modules/%v/modules.dep.bin
PathChanged=/usr/bin/nvidia-ctk
# The stand-in's own sign that the driver was loaded.
PathChanged=/run/lab-gpu/driver

[Install]
WantedBy=multi-user.target
"""

NOUVEAU = "blacklist nouveau\noptions nouveau modeset=0\n"


@dataclass(frozen=True)
class Mps:
    """The real MPS daemon: the file name of Debian's package, and its programs by name."""

    package: str
    programs: Mapping[str, bytes]

    def note(self) -> str:
        return (
            f"{' and '.join(f'/usr/bin/{name}' for name in sorted(self.programs))} are real:\n"
            f"taken unchanged from Debian's package {self.package}.\n"
            "All else of this package is simulated (gpulab rehearsal).\n"
        )


@dataclass(frozen=True)
class Driver:
    """What the compiler made for one driver version."""

    version: str
    nvml: bytes
    cuda: bytes
    smi: bytes
    persistenced: bytes
    mps: Mps = Mps("none", {})
    #: Does its module build?
    builds: bool = True


def module_source(version: str, builds: bool = True) -> dict[str, File | Link]:
    """/usr/src/nvidia-VERSION: the source that DKMS builds, real where headers are, and its dkms.conf."""
    folder = SOURCE / "dkms"
    found: dict[str, File | Link] = {}

    def put(name: str, source: str, module: str = "") -> None:
        content = source.replace("@VERSION@", version).replace("@MODULE@", module)
        found[f"/usr/src/nvidia-{version}/{name}"] = text(content)

    for name in ("Kbuild", "Makefile", "dkms.conf"):
        put(name, (folder / name).read_text())
    for module in ("nvidia", "nvidia-uvm", "nvidia-modeset", "nvidia-drm"):
        source = (folder / "module.c").read_text()
        if module == "nvidia" and not builds:
            source += (folder / "broken.c").read_text()
        put(f"{module}.c", source, module)
    return found


def wrapper(tool: str) -> File:
    """A shell script in front of a module tool: NVIDIA's module goes to the simulation, the rest to the real tool.

    /bin/sh starts in a millisecond; Python is started only for the module that is simulated.
    """
    simulated = f'exec /usr/bin/python3 -IS {HOME}/module.py {tool} "$@"'
    if tool == "lsmod":
        return text(f"#!/bin/sh\n# simulated: see {HOME}/module.py\n{simulated}\n", 0o755)
    if tool == "dkms":
        # The real dkms, where somebody installed it, knows all modules but ours, and ours for the kernels that the
        # guest has an image or headers of; of the control machine's kernel it has neither.
        script = f"""\
real={HOME}/diverted/dkms
[ -x $real ] || {simulated}
kernel=$(uname -r) last=
for word in "$@"; do
    case $last in -k) kernel=${{word%%/*}};; esac
    last=$word
done
if [ -e /boot/vmlinuz-$kernel ] || [ -e /lib/modules/$kernel/build ]; then exec $real "$@"; fi
for word in "$@"; do case $word in nvidia*) {simulated};; esac; done
case $1 in status|autoinstall) {simulated.removeprefix("exec ")} || exit;; esac
exec $real "$@"
"""
    else:
        script = (
            f'for word in "$@"; do case $word in nvidia|nvidia[_-]*) {simulated};; esac; done\n'
            f'exec {HOME}/real/{tool} "$@"\n'
        )
    return text(f"#!/bin/sh\n# simulated: see {HOME}/module.py\n{script}", 0o755)


def _divert() -> str:
    lines = [f"mkdir -p {HOME}/diverted\n"]
    for path, tool in DIVERTED.items():
        # Two paths of one tool need two places.
        place = f"{HOME}/diverted/{tool}" + ("-bin" if path.startswith("/usr/bin") else "")
        lines.append(f"dpkg-divert --quiet --package nvidia-kernel-open-dkms --add --rename --divert {place} {path}\n")
    return "".join(lines)


def _undivert() -> str:
    lines = "".join(
        f"    dpkg-divert --quiet --package nvidia-kernel-open-dkms --remove --rename {path}\n" for path in DIVERTED
    )
    return f'if [ "$1" = remove ] || [ "$1" = disappear ]; then\n{lines}fi\n'


def _enable(*units: str) -> str:
    # Booted or not (an image being built), `enable` only makes links.
    return f'if [ "$1" = configure ]; then\n    systemctl enable --quiet {" ".join(units)}\nfi\n'


def _disable(*units: str) -> str:
    return f'if [ "$1" = remove ]; then\n    systemctl disable --quiet --now {" ".join(units)}\nfi\n'


def _dkms(command: str, version: str) -> str:
    """What the package's scripts do with DKMS: as debhelper's own where it is real, else the simulation's command."""
    real = {
        "build": f'/usr/lib/dkms/common.postinst nvidia {version} /usr/share/nvidia "" "$2"',
        "remove": f"dkms remove -m nvidia -v {version} --all",
    }
    return (
        f"if [ -x {HOME}/diverted/dkms ] && [ -e /boot/vmlinuz-$(uname -r) ]; then\n    {real[command]}\n"
        f"else\n    /usr/bin/python3 -IS {HOME}/module.py dkms {command} {version}\nfi\n"
    )


RELOAD = "if [ -d /run/systemd/system ]; then\n    systemctl daemon-reload\nfi\n"


def driver_packages(driver: Driver) -> list[Package]:
    """All packages of one driver version."""
    version = driver.version
    full = f"{version}-1"
    module = (SOURCE / "module.py").read_text()

    def package(
        name: str,
        summary: str,
        files: Mapping[str, File | Link],
        depends: str = "",
        scripts: Mapping[str, str] | None = None,
        **relations: str,
    ) -> Package:
        return Package(
            name,
            full,
            summary,
            files,
            {"Depends": depends, **relations},
            scripts or {},
            source="" if name == "nvidia-persistenced" else "nvidia-graphics-drivers",
        )

    def library(name: str, content: bytes) -> dict[str, File | Link]:
        return {
            f"{LIBRARIES}/{name}.so.{version}": File(content),
            f"{LIBRARIES}/{name}.so.1": Link(f"{name}.so.{version}"),
        }

    tools: dict[str, File | Link] = {path: wrapper(tool) for path, tool in DIVERTED.items()}
    tools |= {f"{HOME}/real/{tool}": Link("/usr/bin/kmod") for tool in set(DIVERTED.values()) - {"dkms"}}
    return [
        package("libnvidia-ml1", "NVIDIA Management Library", library("libnvidia-ml", driver.nvml), "libc6 (>= 2.34)"),
        package(
            "libcuda1",
            "NVIDIA CUDA driver library",
            {**library("libcuda", driver.cuda), f"{LIBRARIES}/libcuda.so": Link("libcuda.so.1")},
            "libc6 (>= 2.34)",
        ),
        package(
            "nvidia-driver-cuda",
            "NVIDIA driver, CUDA part",
            {
                "/usr/bin/nvidia-smi": File(driver.smi, 0o755),
                **{f"/usr/bin/{name}": File(content, 0o755) for name, content in driver.mps.programs.items()},
                "/usr/share/doc/nvidia-driver-cuda/README.rehearsal": text(driver.mps.note()),
            },
            f"libcuda1 (= {full}), libnvidia-ml1 (= {full}), nvidia-persistenced (= {full}), "
            f"nvidia-kernel-open-dkms (= {full}) | nvidia-kernel-dkms (= {full})",
            Conflicts="nvidia-smi, nvidia-cuda-mps",
            Replaces="nvidia-smi, nvidia-cuda-mps",
        ),
        package(
            "nvidia-persistenced",
            "daemon that keeps the driver loaded",
            {
                "/usr/bin/nvidia-persistenced": File(driver.persistenced, 0o755),
                f"{UNITS}/nvidia-persistenced.service": text(PERSISTENCED_UNIT),
                "/usr/lib/sysusers.d/nvidia-persistenced.conf": text(
                    'u nvpd - "NVIDIA Persistence Daemon" /var/run/nvpd -\n'
                ),
            },
            "libc6 (>= 2.34)",
            {
                "postinst": "systemd-sysusers nvidia-persistenced.conf\n"
                + _enable("nvidia-persistenced.service")
                + RELOAD,
                "prerm": _disable("nvidia-persistenced.service"),
                "postrm": RELOAD,
            },
        ),
        package(
            "nvidia-kernel-support",
            "settings of the NVIDIA kernel module",
            {"/usr/lib/modprobe.d/nvidia-blacklists-nouveau.conf": text(NOUVEAU)},
            "nvidia-modprobe",
        ),
        package("nvidia-modprobe", "loader of the kernel module", {f"{HOME}/nvidia-modprobe": text("simulated\n")}),
        package(
            "firmware-nvidia-gsp",
            "GSP firmware",
            {f"/usr/lib/firmware/nvidia/{version}/gsp_ga10x.bin": text("simulated\n")},
        ),
        package(
            "nvidia-kernel-open-dkms",
            "NVIDIA open kernel module, source for DKMS",
            {
                **tools,
                f"{HOME}/module.py": text(module),
                f"{UNITS}/nvidia-simulated-load.service": text(LOAD_UNIT),
                **{f"{UNITS}/{unit}.d/lab.conf": text(SETTING_DROP_IN) for unit in SETTING_UNITS},
                f"{UNITS}/sysinit.target.wants/nvidia-simulated-load.service": Link("../nvidia-simulated-load.service"),
                **module_source(version, driver.builds),
            },
            f"nvidia-kernel-support (= {full}), firmware-nvidia-gsp (= {full}), python3:any, kmod",
            {
                "preinst": _divert(),
                "postinst": f'if [ "$1" = configure ]; then\n{_dkms("build", version)}fi\n' + RELOAD,
                "prerm": _dkms("remove", version),
                "postrm": _undivert() + RELOAD,
            },
            Provides=f"nvidia-kernel-dkms (= {full})",
        ),
    ]


def pinning_packages(name: str, version: str, pattern: str) -> Package:
    """`nvidia-driver-pinning-NAME`: holds the driver at versions of `pattern`."""
    pin = (
        "Package: src:*nvidia*:any src:cuda-drivers:any src:cuda-compat:any\n"
        f"Pin: version {pattern}\nPin-Priority: 1000\n"
    )
    path = "/etc/apt/preferences.d/nvidia-driver-pinning"
    return Package(
        f"nvidia-driver-pinning-{name}",
        version,
        f"apt pin of NVIDIA driver {name}",
        {path: text(pin)},
        {
            "Provides": "nvidia-driver-pinning",
            "Conflicts": "nvidia-driver-pinning",
            "Replaces": "nvidia-driver-pinning",
        },
        source="nvidia-driver-pinning",
        architecture="all",
    )


def foreign_package() -> Package:
    """A package of somebody else's, in the same repository: it pulls another branch, and no pin names it."""
    return Package(
        "acme-gpu-tool",
        "4.2-1",
        "a tool that wants the newest driver",
        {"/usr/bin/acme-gpu-tool": text("#!/bin/sh\necho 'acme-gpu-tool 4.2 (simulated)'\n", 0o755)},
        {"Depends": f"nvidia-driver-cuda (>= {CUDA_DRIVER.partition('.')[0]})"},
        architecture="all",
    )


def cuda_packages(release: str, version: str) -> list[Package]:
    """`cuda-toolkit-X-Y`, with a compiler that only says its version, and the links to it as NVIDIA's packages set."""
    name = release.replace(".", "-")
    home = f"/usr/local/cuda-{release}"
    major = release.partition(".")[0]
    links = ((f"/usr/local/cuda-{major}", f"cuda-{major}"), ("/usr/local/cuda", "cuda"))
    priority = release.replace(".", "")
    installed = "".join(f"    update-alternatives --install {link} {key} {home} {priority}\n" for link, key in links)
    removed = "".join(f"    update-alternatives --remove {key} {home}\n" for _, key in links)
    full = f"{version.partition('-')[0]}.0"
    nvcc = f"""#!/bin/sh
cat <<END
nvcc: NVIDIA (R) Cuda compiler driver (simulated)
Cuda compilation tools, release {release}, V{full}
END
"""
    return [
        Package(
            f"cuda-nvcc-{name}",
            version,
            f"CUDA compiler {release}",
            {f"{home}/bin/nvcc": text(nvcc, 0o755)},
            source="cuda-nvcc",
        ),
        Package(
            f"cuda-toolkit-{name}-config-common",
            version,
            f"common files of the CUDA toolkit {release}",
            {f"{home}/version.json": text(f'{{"cuda": {{"version": "{full}", "name": "simulated"}}}}\n')},
            scripts={
                "postinst": f'if [ "$1" = configure ]; then\n{installed}fi\n',
                "prerm": f'if [ "$1" = remove ]; then\n{removed}fi\n',
            },
            source="cuda-toolkit",
            architecture="all",
        ),
        Package(
            f"cuda-toolkit-{name}",
            version,
            f"CUDA toolkit {release}",
            relations={"Depends": f"cuda-nvcc-{name} (>= {version}), cuda-toolkit-{name}-config-common (>= {version})"},
            source="cuda-toolkit",
        ),
    ]


def cuda_package() -> Package:
    """`cuda`: the newest toolkit, and with it a driver."""
    release, version = max(CUDA_TOOLKITS.items(), key=lambda pair: tuple(map(int, pair[0].split("."))))
    depends = f"cuda-toolkit-{release.replace('.', '-')} (>= {version}), nvidia-driver-cuda (>= {CUDA_DRIVER})"
    return Package("cuda", version, "CUDA meta-package", relations={"Depends": depends})


def keyring_package(url: str, folder: str, key: bytes) -> Package:
    """`cuda-keyring`: the key and the source line of the repository at `url`, whose folder is `debian13` or so."""
    keyring = "/usr/share/keyrings/cuda-archive-keyring.gpg"
    sources = f"/etc/apt/sources.list.d/cuda-{folder}-x86_64.list"
    return Package(
        "cuda-keyring",
        "1.1-1",
        "key and source of the CUDA repository",
        {
            keyring: File(key),
            sources: text(f"deb [signed-by={keyring}] {url}/ /\n"),
        },
        conffiles=(sources,),
        architecture="all",
    )


def toolkit_packages(version: str) -> list[Package]:
    """The container toolkit's four packages of one version."""
    ctk = (SOURCE / "ctk.py").read_text().replace("@VERSION@", version.partition("-")[0])
    program = text(f"#!/usr/bin/python3 -IS\n{ctk}", 0o755)

    def package(
        name: str,
        summary: str,
        files: Mapping[str, File | Link],
        depends: str = "",
        scripts: Mapping[str, str] | None = None,
    ) -> Package:
        source = "libnvidia-container" if name.startswith("lib") else "nvidia-container-toolkit"
        return Package(name, version, summary, files, {"Depends": depends}, scripts or {}, source=source)

    def printing(what: str) -> File:
        return text(f"#!/bin/sh\necho '{what} {version} (simulated)'\n", 0o755)

    return [
        package(
            "nvidia-container-toolkit-base",
            "NVIDIA Container Toolkit, base",
            {
                "/usr/bin/nvidia-ctk": program,
                "/usr/bin/nvidia-container-runtime": text(
                    '#!/bin/sh\n# simulated: GPUs come into containers by CDI\nexec runc "$@"\n', 0o755
                ),
                f"{UNITS}/nvidia-cdi-refresh.service": text(REFRESH_UNIT),
                f"{UNITS}/nvidia-cdi-refresh.path": text(REFRESH_PATH_UNIT),
            },
            "python3:any",
            {
                "postinst": _enable("nvidia-cdi-refresh.service", "nvidia-cdi-refresh.path")
                + RELOAD
                + "if [ -d /run/systemd/system ]; then\n    systemctl start nvidia-cdi-refresh.path\n"
                "    systemctl start --no-block nvidia-cdi-refresh.service\nfi\n",
                "prerm": _disable("nvidia-cdi-refresh.path", "nvidia-cdi-refresh.service"),
                "postrm": RELOAD,
            },
        ),
        package(
            "libnvidia-container1", "container runtime library", {f"{HOME}/libnvidia-container1": text("simulated\n")}
        ),
        package(
            "libnvidia-container-tools",
            "NVIDIA container runtime tools",
            {"/usr/bin/nvidia-container-cli": printing("nvidia-container-cli")},
            f"libnvidia-container1 (>= {version})",
        ),
        package(
            "nvidia-container-toolkit",
            "NVIDIA Container Toolkit",
            {"/usr/bin/nvidia-container-runtime-hook": printing("nvidia-container-runtime-hook")},
            f"nvidia-container-toolkit-base (= {version}), libnvidia-container-tools (>= {version}), "
            "libnvidia-container-tools (<< 2.0.0)",
        ),
    ]
