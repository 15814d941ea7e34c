# SPDX-License-Identifier: MIT
"""The simulated card as NVML, CUDA and nvidia-smi show it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rehearsal.nvidia import service

VERSION = "580.95.05"
UUID = "GPU-51a7ed00-0000-4000-8000-000000001000"

#: Opens a context, allocates argv[1] MiB, says so, and stays until its input ends.
CLIENT = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
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
        (root / "run/lab-gpu/settings").write_bytes(bytes(4096))
        (root / "run/lab-gpu/clients").touch()
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

    def client(self, mib: int, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(mib)],
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


def test_exclusive_card_takes_one_process_and_then_only_mps_clients(card: Card, load: subprocess.Popen[str]) -> None:
    import socket

    card.smi("-pm", "1")
    card.smi("-c", "EXCLUSIVE_PROCESS")
    assert card.query("compute_mode") == ["Exclusive_Process"]
    with card.client(1) as refused:
        assert refused.communicate()[0] == "0 46 201\n"  # CUDA_ERROR_DEVICE_UNAVAILABLE
    (card.root / "mps").mkdir()
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(card.root / "mps/control"))
        with card.client(1) as admitted:
            assert admitted.communicate()[0] == "0 0 0\n"
        with card.client(600, CUDA_MPS_PINNED_DEVICE_MEM_LIMIT="0=512M") as limited:
            assert limited.communicate()[0] == "0 0 2\n"


@pytest.mark.parametrize(("code", "name"), [(9, "DriverNotLoaded"), (15, "GpuIsLost"), (999, "Unknown")])
def test_init_error_comes_from_the_fault_file(card: Card, code: int, name: str) -> None:
    card.faults(init_error=code)
    assert card.python("0") == f"NVMLError_{name}"


def test_lost_card_fails_every_call_on_it(card: Card) -> None:
    card.faults(lost=1)
    assert card.python("0") == "NVMLError_GpuIsLost"
    done = card.smi()
    assert (done.returncode, "GPU is lost" in done.stdout) == (15, True)


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
    ) == ["91", "8", "3", "0x0000000000000048", "Enabled", "3", "Yes", "99", "3959"]  # fmt: skip


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
