# SPDX-License-Identifier: MIT
"""The simulated card as NVML, CUDA and nvidia-smi show it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rehearsal.nvidia import packages, service

VERSION = "580.95.05"
UUID = "GPU-51a7ed00-0000-4000-8000-000000001000"

#: Opens a context, allocates argv[1] MiB, says so, and stays until its input ends. As user argv[2], if there is one.
CLIENT = """
import ctypes, os, sys
cuda = ctypes.CDLL("libcuda.so.1")
if len(sys.argv) > 2:
    os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
context, address = ctypes.c_void_p(), ctypes.c_uint64()
errors = [cuda.cuInit(0), cuda.cuCtxCreate_v2(ctypes.byref(context), 0, 0)]
errors.append(cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(int(sys.argv[1]) << 20)))
print(*errors, flush=True)
sys.stdin.read()
"""


class Card:
    """A loaded driver with its card, below a folder of the test."""

    def __init__(self, programs: Path, root: Path) -> None:
        self.programs = programs
        self.root = root
        for name in ("dev", "run/lab-gpu", "var/lib/lab-hardware"):
            (root / name).mkdir(parents=True)
        (root / "dev/nvidiactl").touch()
        (root / "dev/nvidiactl").chmod(0o666)
        (root / "run/lab-gpu/settings").write_bytes(bytes(4096))
        (root / "run/lab-gpu/clients").touch()
        (root / "run/lab-gpu/accounting").write_bytes(bytes(4096))
        self.load(VERSION)
        self.environment = {
            **os.environ,
            "LAB_GPU_ROOT": str(root),
            "LD_LIBRARY_PATH": str(programs),
            "CUDA_MPS_PIPE_DIRECTORY": str(root / "mps"),
        }

    def load(self, version: str) -> None:
        (self.root / "run/lab-gpu/driver").write_text(
            f"version={version}\ndevice=0000:01:00.0 10de:24b0 14ad10de {UUID}\n"
        )

    def load_again(self) -> None:
        """What a reload of the module makes of the settings, and so a reboot."""
        module: Any  # its places are assigned to
        spec = importlib.util.spec_from_file_location("module", packages.SOURCE / "module.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.HARDWARE = self.root / "var/lib/lab-hardware"
        (self.root / "run/lab-gpu/settings").write_bytes(module.settings(1))
        (self.root / "run/lab-gpu/accounting").write_bytes(bytes(module.ACCOUNTING))

    def faults(self, **values: object) -> None:
        lines = [f"{key}={value}\n" for key, value in values.items()]
        (self.root / "var/lib/lab-hardware/nvml.conf").write_text("".join(lines))

    def smi(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [str(self.programs / "nvidia-smi"), *words]
        return subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=False)

    def query(self, *fields: str) -> list[str]:
        done = self.smi(f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
        assert done.returncode == 0, done.stdout
        return done.stdout.strip().split(", ")

    def python(self, code: str, *words: str) -> object:
        """The value that an expression over pynvml's `N` and device `d` has in a process of its own."""
        program = (
            "import json, sys, pynvml as N\n"
            "try:\n    N.nvmlInit()\n"
            "    d = N.nvmlDeviceGetHandleByIndex(0)\n"
            f"    print(json.dumps({code}))\n"
            "except N.NVMLError as error:\n    print(json.dumps(type(error).__name__))\n"
        )
        argv = [sys.executable, "-c", program, *words]
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def client(self, mib: int, uid: int | None = None, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(mib), *([] if uid is None else [str(uid)])],
            env={**self.environment, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    driver = service.compile_driver(VERSION, 13000)
    for name, content in (
        ("libnvidia-ml.so.1", driver.nvml),
        ("libcuda.so.1", driver.cuda),
        ("nvidia-smi", driver.smi),
        ("nvidia-persistenced", driver.persistenced),
    ):
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def card(programs: Path, tmp_path: Path) -> Card:
    return Card(programs, tmp_path)


@pytest.fixture
def load(card: Card) -> Iterator[subprocess.Popen[str]]:
    """A process that holds 128 MiB of context and 1000 MiB of memory."""
    with card.client(1000) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0 0 0\n"
        yield process
        process.kill()


def test_pynvml_reads_an_a4000(card: Card) -> None:
    assert card.python(
        "[N.nvmlDeviceGetName(d), hex(N.nvmlDeviceGetPciInfo(d).pciDeviceId), N.nvmlSystemGetDriverVersion(),"
        " N.nvmlDeviceGetCudaComputeCapability(d), N.nvmlDeviceGetMemoryInfo(d).total >> 20,"
        " N.nvmlDeviceGetPowerManagementLimitConstraints(d), N.nvmlDeviceGetEccMode(d), N.nvmlDeviceGetSerial(d)]"
    ) == ["NVIDIA RTX A4000", "0x24b010de", VERSION, [8, 6], 16376, [100000, 140000], [0, 0], "simulated"]


#: A daemon's socket is of this type (nvidia-cuda-mps-control 550.163.01); closed at the end of the test.
@pytest.fixture
def daemon(card: Card) -> Iterator[socket.socket]:
    (card.root / "mps").mkdir(mode=0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
        control.bind(str(card.root / "mps/control"))
        control.listen(8)
        yield control


def answer(client: subprocess.Popen[str]) -> str:
    """What a client says once it has its memory or an error."""
    assert client.stdout is not None
    return client.stdout.readline()


def test_card_at_rest_trains_its_link_down(card: Card) -> None:
    assert card.query("pcie.link.gen.current", "pcie.link.gen.max", "pcie.link.width.current", "pstate") == [
        "1", "4", "16", "P8",
    ]  # fmt: skip


def test_compute_process_is_listed_with_its_memory_and_wakes_the_card(card: Card, load: subprocess.Popen[str]) -> None:
    listed = card.smi("--query-compute-apps=pid,used_memory", "--format=csv,noheader").stdout
    assert listed == f"{load.pid}, 1128 MiB\n"
    assert card.query("memory.used", "pcie.link.gen.current", "pstate") == ["1130", "4", "P2"]


def test_killed_process_gives_its_memory_back(card: Card, load: subprocess.Popen[str]) -> None:
    load.kill()
    load.wait()
    assert card.smi("--query-compute-apps=pid", "--format=csv,noheader").stdout == ""
    assert card.query("memory.used") == ["2"]


def test_process_sees_itself(card: Card) -> None:
    """The kernel tells nobody of their own locks."""
    program = (
        "import ctypes, os, pynvml as N\n"
        "cuda = ctypes.CDLL('libcuda.so.1'); cuda.cuInit(0)\n"
        "cuda.cuCtxCreate_v2(ctypes.byref(ctypes.c_void_p()), 0, 0)\n"
        "N.nvmlInit(); d = N.nvmlDeviceGetHandleByIndex(0)\n"
        "print([(p.pid == os.getpid(), p.usedGpuMemory >> 20) for p in N.nvmlDeviceGetComputeRunningProcesses(d)])"
    )
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, env=card.environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[(True, 128)]\n"


def test_several_processes_share_the_memory_and_none_gets_more_than_there_is(card: Card) -> None:
    clients = [card.client(mib) for mib in (7000, 7000)]
    answers = [client.stdout.readline() for client in clients if client.stdout]
    assert answers == ["0 0 0\n"] * 2
    third = card.client(7000)
    assert third.stdout is not None
    assert third.stdout.readline() == "0 0 2\n"  # CUDA_ERROR_OUT_OF_MEMORY
    assert len(card.smi("--query-compute-apps=pid", "--format=csv,noheader").stdout.splitlines()) == 3
    for client in (*clients, third):
        client.communicate()


def test_exclusive_card_takes_one_process(card: Card, load: subprocess.Popen[str]) -> None:
    card.smi("-pm", "1")
    card.smi("-c", "EXCLUSIVE_PROCESS")
    assert card.query("compute_mode") == ["Exclusive_Process"]
    with card.client(1) as refused:
        assert refused.communicate()[0] == "0 46 201\n"  # CUDA_ERROR_DEVICE_UNAVAILABLE
    load.kill()
    load.wait()
    with card.client(1) as admitted:
        assert admitted.communicate()[0] == "0 0 0\n"


def test_clients_of_mps_share_an_exclusive_card_and_nobody_joins_them(card: Card, daemon: socket.socket) -> None:
    card.smi("-pm", "1")
    card.smi("-c", "EXCLUSIVE_PROCESS")
    with card.client(600) as first, card.client(600) as second:
        assert (answer(first), answer(second)) == ("0 0 0\n", "0 0 0\n")
        with card.client(1, CUDA_MPS_PIPE_DIRECTORY=str(card.root / "none")) as alone:
            assert alone.communicate()[0] == "0 46 201\n"
        first.communicate()
        second.communicate()


def test_memory_limit_ends_only_the_client_that_passes_it(card: Card, daemon: socket.socket) -> None:
    with card.client(600) as other:
        assert answer(other) == "0 0 0\n"
        for limit, asked, said in (("0=512M", 600, 2), ("0=4G", 4097, 2), ("0=4096M", 4096, 0), ("1=1M,0=1G", 1000, 0)):
            with card.client(asked, CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=limit) as limited:
                assert limited.communicate()[0] == f"0 0 {said}\n", limit
        assert other.poll() is None
        other.communicate()


def test_memory_limit_is_nothing_without_mps(card: Card) -> None:
    with card.client(600, CUDA_MPS_PINNED_DEVICE_MEM_LIMIT="0=512M") as client:
        assert client.communicate()[0] == "0 0 0\n"


def test_mps_client_has_two_contexts_and_another_process_one(card: Card, daemon: socket.socket) -> None:
    with card.client(1) as client, card.client(1, CUDA_MPS_PIPE_DIRECTORY=str(card.root / "none")) as alone:
        assert (answer(client), answer(alone)) == ("0 0 0\n", "0 0 0\n")
        lists = (
            "[sorted(p.pid for p in list(d)) for list in"
            " (N.nvmlDeviceGetComputeRunningProcesses, N.nvmlDeviceGetMPSComputeRunningProcesses)]"
        )
        assert card.python(lists) == [sorted([client.pid, alone.pid]), [client.pid]]
        types = {words[4]: words[5] for line in card.smi().stdout.splitlines() if len(words := line.split()) == 9}
        assert types == {str(client.pid): "M+C", str(alone.pid): "C"}
        client.communicate()
        alone.communicate()


def test_dead_mps_daemon_is_told_at_once(card: Card, daemon: socket.socket) -> None:
    """A daemon that was killed leaves its socket behind."""
    daemon.close()
    with card.client(1) as client:
        assert client.communicate(timeout=10)[0] == "805 3 201\n"  # CUDA_ERROR_MPS_CONNECTION_FAILED


def test_mps_daemon_that_accepts_nobody_does_not_hang_a_client(card: Card, daemon: socket.socket) -> None:
    daemon.listen(0)
    waiting = []
    while True:
        waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        waiting[-1].setblocking(False)
        if waiting[-1].connect_ex(str(card.root / "mps/control")):
            break
    with card.client(1) as client:
        assert client.communicate(timeout=30)[0] == "805 3 201\n"
    for caller in waiting:
        caller.close()


def test_pipe_folder_without_a_daemon_is_no_mps(card: Card) -> None:
    (card.root / "mps").mkdir()
    with card.client(1) as client:
        assert client.communicate()[0] == "0 0 0\n"


def test_prohibited_card_takes_nobody(card: Card, daemon: socket.socket) -> None:
    card.smi("-pm", "1")
    card.smi("-c", "PROHIBITED")
    for folder in ("mps", "none"):
        with card.client(1, CUDA_MPS_PIPE_DIRECTORY=str(card.root / folder)) as client:
            assert client.communicate()[0] == "0 46 201\n"


def test_context_reads_back_what_it_wrote_while_the_link_is_fast(card: Card) -> None:
    program = (
        "import ctypes as c, pynvml as N\n"
        "cuda = c.CDLL('libcuda.so.1'); context, at = c.c_void_p(), c.c_uint64()\n"
        "cuda.cuInit(0); cuda.cuDevicePrimaryCtxRetain(c.byref(context), 0)\n"
        "cuda.cuMemAlloc_v2(c.byref(at), c.c_size_t(1 << 20)); size = c.c_size_t(1 << 20)\n"
        "sent, got = c.create_string_buffer(bytes(range(256)) * 4096, 1 << 20), c.create_string_buffer(1 << 20)\n"
        "print(cuda.cuMemcpyHtoD_v2(at, sent, size), cuda.cuMemcpyDtoH_v2(got, at, size))\n"
        "print(sent.raw == got.raw, cuda.cuMemcpyHtoD_v2(at, sent, c.c_size_t((1 << 20) + 1)))\n"
        "N.nvmlInit(); d = N.nvmlDeviceGetHandleByIndex(0)\n"
        "print(N.nvmlDeviceGetCurrPcieLinkGeneration(d), N.nvmlDeviceGetPcieSpeed(d))\n"
        "cuda.cuDevicePrimaryCtxRelease_v2(0)\n"
        "print(N.nvmlDeviceGetCurrPcieLinkGeneration(d), N.nvmlDeviceGetPcieSpeed(d))\n"
    )
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, env=card.environment, capture_output=True, text=True, check=True)
    assert done.stdout == "0 0\nTrue 1\n4 16000\n1 2500\n"


@pytest.mark.parametrize(("code", "name"), [(9, "DriverNotLoaded"), (15, "GpuIsLost"), (999, "Unknown")])
def test_init_error_comes_from_the_fault_file(card: Card, code: int, name: str) -> None:
    card.faults(init_error=code)
    assert card.python("0") == f"NVMLError_{name}"


def test_lost_card_fails_every_call_on_it(card: Card) -> None:
    card.faults(lost=1)
    assert card.python("0") == "NVMLError_GpuIsLost"
    done = card.smi()
    assert (done.returncode, "GPU is lost" in done.stdout) == (15, True)
    with card.client(1) as client:
        assert client.communicate()[0] == "100 3 201\n"  # CUDA_ERROR_NO_DEVICE


@pytest.mark.parametrize("how", ["fault", "module"])
def test_processes_lose_a_card_that_falls_off_the_bus(card: Card, how: str) -> None:
    """A handle and a context from before answer with nothing but the loss."""
    program = (
        "import ctypes as c, pynvml as N\n"
        "cuda = c.CDLL('libcuda.so.1'); cuda.cuInit(0); cuda.cuCtxCreate_v2(c.byref(c.c_void_p()), 0, 0)\n"
        "N.nvmlInit(); d = N.nvmlDeviceGetHandleByIndex(0); print(cuda.cuCtxSynchronize(), flush=True); input()\n"
        "for ask in (N.nvmlDeviceGetName, N.nvmlDeviceGetMemoryInfo, N.nvmlDeviceGetPowerUsage):\n"
        "    try:\n        ask(d)\n    except N.NVMLError_GpuIsLost:\n        print('lost')\n"
        "allocated = cuda.cuMemAlloc_v2(c.byref(c.c_uint64()), c.c_size_t(1))\n"
        "print(N.nvmlDeviceGetCount(), cuda.cuCtxSynchronize(), allocated)"
    )
    argv = [sys.executable, "-c", program]
    with subprocess.Popen(argv, env=card.environment, stdin=-1, stdout=-1, text=True) as process:
        assert answer(process) == "0\n"
        if how == "fault":
            card.faults(off_bus=1)
        else:
            (card.root / "run/lab-gpu/off-bus").mkdir()
            (card.root / "run/lab-gpu/off-bus/0000:01:00.0").touch()
        assert process.communicate("\n")[0] == "lost\nlost\nlost\n1 999 999\n"


def test_unloaded_driver_is_told_in_the_words_of_the_real_tool(card: Card) -> None:
    (card.root / "run/lab-gpu/driver").unlink()
    done = card.smi()
    assert done.returncode == 9
    assert done.stdout.startswith(
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
        "Make sure that the latest NVIDIA driver is installed and running."
    )


def test_library_of_another_version_than_the_module_is_refused(card: Card) -> None:
    card.load("580.105.08")
    assert card.python("0") == "NVMLError_LibRmVersionMismatch"
    done = card.smi()
    assert done.returncode == 18
    assert (
        done.stdout == f"Failed to initialize NVML: Driver/library version mismatch\nNVML library version: {VERSION}\n"
    )


def test_no_device_node_is_no_driver(card: Card) -> None:
    (card.root / "dev/nvidiactl").unlink()
    assert card.smi().returncode == 9


def test_no_card_is_told(card: Card) -> None:
    card.faults(device_count=0)
    done = card.smi()
    assert (done.returncode, done.stdout) == (6, "No devices were found\n")


def test_faults_are_seen_at_once(card: Card) -> None:
    card.faults(
        temperature_c=91, link_width=8, link_generation=3, event_reasons="0x48", ecc_mode=1, ecc_uncorrected=3,
        remapped_pending=1, utilization_percent=99, memory_used_mib=12000,
    )  # fmt: skip
    assert card.query(
        "temperature.gpu", "pcie.link.width.current", "pcie.link.gen.current", "clocks_event_reasons.active",
        "ecc.mode.current", "ecc.errors.uncorrected.volatile.total", "remapped_rows.pending", "utilization.gpu",
        "memory.free",
    ) == ["91", "8", "3", "0x0000000000000048", "Enabled", "3", "Yes", "99", "2935"]  # fmt: skip


def test_fault_of_one_device_leaves_the_others_alone(card: Card) -> None:
    (card.root / "var/lib/lab-hardware/nvml.conf").write_text("1.temperature_c=91\n")
    assert card.query("temperature.gpu") == ["31"]


def test_xid_arrives_as_an_event(card: Card) -> None:
    card.faults(xid=79)
    assert (
        card.python(
            "(lambda s: (N.nvmlDeviceRegisterEvents(d, N.nvmlEventTypeXidCriticalError, s),"
            " N.nvmlEventSetWait_v2(s, 100).eventData)[1])(N.nvmlEventSetCreate())"
        )
        == 79
    )


root_only = pytest.mark.skipif(os.geteuid() != 0, reason="changes settings of the card: needs root")


@root_only
def test_power_limit_set_by_one_process_is_seen_by_all(card: Card) -> None:
    card.smi("-pm", "1")
    done = card.smi("-pl", "120")
    assert done.returncode == 0
    assert "Power limit for GPU 00000000:01:00.0 was set to 120.00 W from 140.00 W." in done.stdout
    assert card.query("power.limit", "enforced.power.limit") == ["120.00", "120.00"]


@root_only
def test_settings_are_lost_with_the_last_user_unless_persistence_is_on(card: Card) -> None:
    """As on a real card: why the persistence daemon comes before the power limit."""
    done = card.smi("-pl", "120")
    assert "persistence mode is disabled" in done.stdout
    assert card.query("power.limit") == ["140.00"]


@root_only
def test_power_limit_out_of_range_is_refused(card: Card) -> None:
    done = card.smi("-pl", "500")
    assert done.returncode == 2
    assert "should be between 100.00 W and 140.00 W" in done.stdout


@root_only
def test_settings_cannot_be_changed_without_privilege(card: Card) -> None:
    """Root of a container without CAP_SYS_ADMIN is what a service runs as."""
    argv = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", str(card.programs / "nvidia-smi"), "-pl", "120"]
    done = subprocess.run(argv, env=card.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "Insufficient Permissions" in done.stdout


#: pynvml's calls that change something, with arguments that root may give.
CHANGES = [
    "N.nvmlDeviceSetPowerManagementLimit(d, 120000)",
    "N.nvmlDeviceSetGpuLockedClocks(d, 600, 1200)",
    "N.nvmlDeviceResetGpuLockedClocks(d)",
    "N.nvmlDeviceSetEccMode(d, 1)",
    "N.nvmlDeviceClearEccErrorCounts(d, 0)",
    "N.nvmlDeviceSetAccountingMode(d, 1)",
    "N.nvmlDeviceClearAccountingPids(d)",
]


@root_only
@pytest.mark.parametrize("change", CHANGES)
def test_only_privilege_changes_the_card(card: Card, change: str) -> None:
    card.faults(ecc_mode=1)
    card.smi("-pm", "1")
    card.smi("-am", "1")
    # The library has opened its files by then, also those that a stranger could not.
    assert card.python(f"(__import__('os').setuid(65534), {change})[1]") == "NVMLError_NoPermission"
    assert card.python(change) is None


@root_only
def test_locked_clocks_hold_at_rest_and_under_load_until_they_are_given_free(card: Card) -> None:
    card.smi("-pm", "1")
    done = card.smi("-lgc", "600,1200")
    assert done.stdout == 'GPU clocks set to "(gpuClkMin 600, gpuClkMax 1200)" for GPU 00000000:01:00.0\nAll done.\n'
    assert card.query("clocks.sm", "clocks.max.sm", "clocks.mem") == ["600", "2100", "405"]
    with card.client(1) as client:
        assert answer(client) == "0 0 0\n"
        assert card.query("clocks.sm", "clocks.mem") == ["1200", "7001"]
        assert card.python("[N.nvmlDeviceGetClock(d, N.NVML_CLOCK_SM, id) for id in (0, 3)]") == [1200, 2100]
        assert card.smi("-rgc").stdout == "All done.\n"
        assert card.query("clocks.gr") == ["1560"]
        client.communicate()


@root_only
def test_locked_clocks_go_with_the_last_user_unless_persistence_is_on(card: Card) -> None:
    assert "persistence mode is disabled" in card.smi("-lgc=900").stdout
    assert card.query("clocks.sm") == ["210"]


@root_only
@pytest.mark.parametrize("bounds", ["300, 2101", "100, 200", "1200, 600"])
def test_clocks_out_of_range_are_refused(card: Card, bounds: str) -> None:
    assert card.python(f"N.nvmlDeviceSetGpuLockedClocks(d, {bounds})") == "NVMLError_InvalidArgument"
    assert card.smi("-lgc", bounds.replace(" ", "")).returncode == 2


def test_clocks_that_the_card_knows(card: Card) -> None:
    clocks = card.python(
        "[N.nvmlDeviceGetSupportedMemoryClocks(d)[0], N.nvmlDeviceGetSupportedGraphicsClocks(d, 7001)[:2],"
        " N.nvmlDeviceGetSupportedGraphicsClocks(d, 7001)[-1], N.nvmlDeviceGetSupportedGraphicsClocks(d, 405)[0]]"
    )
    assert clocks == [7001, [2100, 2085], 210, 420]
    assert card.python("N.nvmlDeviceGetSupportedGraphicsClocks(d, 1)") == "NVMLError_NotFound"


@root_only
def test_heat_follows_the_power_limit(card: Card) -> None:
    """All that a thermal policy looks at: it lowers the limit in steps, and raises it again."""
    card.smi("-pm", "1")
    card.faults(load_percent=100, heat_c_per_w=0.5)
    seen = []
    for watts in ("140", "120", "100", "140"):
        card.smi("-pl", watts)
        seen.append(card.query("temperature.gpu", "power.draw", "clocks.sm"))
    assert seen == [
        ["97", "140.00", "780"],
        ["87", "120.00", "1337"],
        ["77", "100.00", "1114"],
        ["97", "140.00", "780"],
    ]
    card.faults(temperature_c=92, heat_c_per_w=0.5)
    assert card.query("temperature.gpu") == ["92"]
    card.smi("-pl", "110")
    assert card.query("temperature.gpu") == ["77"]
    card.faults(temperature_c=92)
    assert card.query("temperature.gpu") == ["92"]


@root_only
def test_reasons_for_lower_clocks_follow_load_and_heat(card: Card) -> None:
    names = ("gpu_idle", "sw_power_cap", "sw_thermal_slowdown", "hw_thermal_slowdown")

    def active() -> list[str]:
        values = card.query(*(f"clocks_event_reasons.{name}" for name in names))
        return [name for name, value in zip(names, values, strict=True) if value == "Active"]

    card.smi("-pm", "1")
    assert active() == ["gpu_idle"]
    card.faults(load_percent=100)
    assert active() == []
    card.smi("-pl", "100")
    assert active() == ["sw_power_cap"]
    card.faults(load_percent=50, temperature_c=90)
    assert active() == ["sw_thermal_slowdown"]
    card.faults(load_percent=50, temperature_c=95)
    assert active() == ["sw_thermal_slowdown", "hw_thermal_slowdown"]
    card.faults(event_reasons=0x80)
    assert card.query("clocks_event_reasons.active", "clocks_throttle_reasons.hw_power_brake_slowdown") == [
        "0x0000000000000080", "Active",
    ]  # fmt: skip


def test_thresholds_of_the_temperature_are_in_order(card: Card) -> None:
    kinds = "(N.NVML_TEMPERATURE_THRESHOLD_GPU_MAX, N.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN, 0)"
    assert card.python(f"[N.nvmlDeviceGetTemperatureThreshold(d, kind) for kind in {kinds}]") == [90, 95, 98]


@root_only
def test_ecc_mode_waits_for_the_driver_to_be_loaded_again(card: Card) -> None:
    done = card.smi("-e", "1")
    assert done.stdout == "Enabled ECC support for GPU 00000000:01:00.0.\nAll done.\nReboot required.\n"
    fields = ("ecc.mode.current", "ecc.mode.pending", "memory.total", "ecc.errors.corrected.volatile.total")
    assert card.query(*fields) == ["Disabled", "Enabled", "16376", "[N/A]"]
    assert card.smi("-e", "1").stdout == "ECC support is already Enabled for GPU 00000000:01:00.0.\nAll done.\n"
    card.load_again()
    assert card.query(*fields) == ["Enabled", "Enabled", "15352", "0"]
    assert card.smi("-e", "0").stdout.endswith("Reboot required.\n")
    assert card.python("N.nvmlDeviceGetEccMode(d)") == [1, 0]
    card.load_again()
    assert card.query(*fields) == ["Disabled", "Disabled", "16376", "[N/A]"]


@root_only
def test_ecc_counters_are_cleared_each_for_itself(card: Card) -> None:
    fields = [
        f"ecc.errors.{kind}.{counter}.{place}"
        for counter in ("volatile", "aggregate") for kind in ("corrected", "uncorrected") for place in ("dram", "total")
    ]  # fmt: skip
    card.faults(ecc_mode=1, ecc_corrected=7, ecc_uncorrected=2, ecc_uncorrected_aggregate=9)
    assert card.query(*fields) == ["7", "7", "2", "2", "7", "7", "9", "9"]
    assert card.query("ecc.errors.uncorrected.volatile.sram", "ecc.errors.uncorrected.volatile.l2_cache") == [
        "0",
        "[N/A]",
    ]
    assert card.smi("-p", "0").stdout == "Reset volatile ECC errors to zero for GPU 00000000:01:00.0.\nAll done.\n"
    assert card.query(*fields) == ["0", "0", "0", "0", "7", "7", "9", "9"]
    assert card.smi("-p", "1").returncode == 0
    card.load_again()
    assert card.query(*fields) == ["7", "7", "2", "2", "0", "0", "0", "0"]
    card.faults(ecc_mode=1, ecc_uncorrected_aggregate=10)
    assert card.query("ecc.errors.uncorrected.aggregate.total") == ["1"]


def test_errors_of_memory_that_the_card_has_no_counter_for(card: Card) -> None:
    assert card.python("N.nvmlDeviceGetRetiredPages(d, 0)") == "NVMLError_NotSupported"
    assert card.python("N.nvmlDeviceGetTotalEccErrors(d, 1, 0)") == "NVMLError_NotSupported"
    assert card.query("retired_pages.pending") == ["[N/A]"]
    card.faults(remapped_uncorrected=2, remapped_failure=1, replay_count=17)
    assert card.query("remapped_rows.uncorrectable", "remapped_rows.failure") == ["2", "Yes"]
    assert card.python("[N.nvmlDeviceGetRemappedRows(d), N.nvmlDeviceGetPcieReplayCounter(d)]") == [[0, 2, 0, 1], 17]


STATS = (
    "[[(p == {pid}, s.isRunning, s.maxMemoryUsage >> 20, s.time) for p in N.nvmlDeviceGetAccountingPids(d)"
    " for s in [N.nvmlDeviceGetAccountingStats(d, p)]], N.nvmlDeviceGetAccountingBufferSize(d)]"
)


@root_only
def test_accounting_remembers_processes_that_are_gone(card: Card) -> None:
    assert card.python("N.nvmlDeviceGetAccountingPids(d)") == "NVMLError_NotSupported"
    card.smi("-pm", "1")
    with card.client(10) as before:
        assert answer(before) == "0 0 0\n"
        before.communicate()
    assert card.smi("-am", "1").returncode == 0
    with card.client(100) as killed:
        assert answer(killed) == "0 0 0\n"
        assert card.python(STATS.format(pid=killed.pid)) == [[[True, 1, 228, 0]], 128]
        killed.send_signal(signal.SIGKILL)
    accounted = card.python(
        f"(lambda s: [s.isRunning, s.maxMemoryUsage >> 20])(N.nvmlDeviceGetAccountingStats(d, {killed.pid}))"
    )
    assert accounted == [0, 228]
    started = card.python(f"N.nvmlDeviceGetAccountingStats(d, {killed.pid}).startTime")
    assert isinstance(started, int) and abs(started / 1e6 - time.time()) < 600
    assert card.python("N.nvmlDeviceGetAccountingStats(d, 1)") == "NVMLError_NotFound"
    assert card.smi("-caa").returncode == 0
    assert card.python("N.nvmlDeviceGetAccountingPids(d)") == []


@root_only
def test_client_of_another_user_is_refused_at_once(programs: Path) -> None:
    """The pipe folder is the service user's own."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        card = Card(programs, Path(folder))
        (card.root / "mps").mkdir(mode=0o700)
        os.chown(card.root / "mps", 850, 850)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
            control.bind(str(card.root / "mps/control"))
            control.listen(8)
            (card.root / "mps/control").chmod(0o666)
            with card.client(1, uid=850) as service_user, card.client(1, uid=65534) as stranger:
                assert service_user.communicate(timeout=10)[0] == "0 0 0\n"
                assert stranger.communicate(timeout=10)[0] == "805 3 201\n"


def test_reset_is_refused(card: Card) -> None:
    done = card.smi("-r")
    assert (done.returncode, "simulated" in done.stdout) == (3, True)


def test_sections_are_chosen(card: Card) -> None:
    shown = card.smi("-q", "-d", "ECC,TEMPERATURE").stdout
    assert ("ECC Mode" in shown, "GPU Current Temp" in shown, "Product Name" in shown) == (True, True, False)


@root_only
def test_persistence_daemon_needs_a_driver(card: Card) -> None:
    daemon = str(card.programs / "nvidia-persistenced")
    (card.root / "run/lab-gpu/driver").rename(card.root / "driver")
    done = subprocess.run([daemon], env=card.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "failed to initialize" in done.stderr


def test_what_people_read_says_simulated(card: Card) -> None:
    for words in ([], ["-L"], ["-q"], ["--version"]):
        assert "simulated" in card.smi(*words).stdout


def test_csv_is_that_of_the_real_tool(card: Card) -> None:
    done = card.smi("--query-gpu=name,memory.total,power.draw,pci.bus_id", "--format=csv")
    assert done.stdout == (
        "name, memory.total [MiB], power.draw [W], pci.bus_id\nNVIDIA RTX A4000, 16376 MiB, 8.00 W, 00000000:01:00.0\n"
    )


def test_unknown_field_is_refused(card: Card) -> None:
    done = card.smi("--query-gpu=nonsense", "--format=csv")
    assert (done.returncode, done.stdout) == (2, 'Field "nonsense" is not a valid field to query.\n\n')


@pytest.mark.parametrize("identity", ["0", UUID, "00000000:01:00.0", "0000:01:00.0"])
def test_card_is_chosen_by_any_of_its_names(card: Card, identity: str) -> None:
    assert card.smi("-i", identity, "--query-gpu=uuid", "--format=csv,noheader").stdout == f"{UUID}\n"


def test_cuda_refuses_to_run_code(card: Card) -> None:
    """No benchmark may take the card for a real one."""
    program = "import ctypes; c = ctypes.CDLL('libcuda.so.1'); c.cuInit(0); print(c.cuModuleLoadData(None, None))"
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, env=card.environment, capture_output=True, text=True, check=True)
    assert done.stdout == "801\n"


def test_hidden_card_is_no_card_to_cuda(card: Card) -> None:
    with card.client(1, CUDA_VISIBLE_DEVICES="-1") as client:
        assert client.communicate()[0].startswith("100 ")


def test_clients_that_start_together_get_a_share_each(card: Card) -> None:
    clients = [card.client(10) for _ in range(12)]
    for client in clients:
        assert client.stdout is not None
        assert client.stdout.readline() == "0 0 0\n"
    deadline = time.monotonic() + 5
    while len(listed := card.smi("--query-compute-apps=pid", "--format=csv,noheader").stdout.split()) < 12:
        assert time.monotonic() < deadline, listed
    assert sorted(map(int, listed)) == sorted(client.pid for client in clients)
    for client in clients:
        client.communicate()
