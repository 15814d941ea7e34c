# SPDX-License-Identifier: MIT
"""The program on the simulated driver: what it reports, what it does about errors, whom it leaves alone."""

from __future__ import annotations

import ast
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.benchmarks.conftest import Driver
from verify.benchmarks import PROGRAM, gpubench, program

#: Metrics that use every function of the driver between them, and are quick here.
ALL_CALLS = ("memory.copy", "bidirectional.pinned", "fp32.fma", "launch.latency", "memory.pattern")
SOME = [f"--metric={name}" for name in ALL_CALLS]
#: Those that only tell what an error means.
WORDS = ("cuGetErrorName", "cuGetErrorString")
FREES = ("cuMemFree_v2", "cuMemFreeHost", "cuStreamDestroy_v2", "cuEventDestroy_v2", "cuModuleUnload")
RELEASE = "cuDevicePrimaryCtxRelease_v2"


def test_everything_is_measured_checked_and_freed(driver: Driver) -> None:
    found = driver.run()

    assert (found.status, found.result["verdict"], found.reason) == (0, "measured", "")
    assert list(found.result["metrics"]) == list(gpubench.METRICS)
    assert all(metric["checked"] and metric["wrong"] == 0 for metric in found.result["metrics"].values())
    assert driver.wrong_use() == []
    assert driver.left() == ""


def test_figures_are_those_of_the_simulated_card(driver: Driver) -> None:
    """Bytes, operations and units are counted right: the simulated card's rates are known."""
    metrics = driver.run().result["metrics"]

    medians = {name: (metric["unit"], metric["samples"][0]) for name, metric in metrics.items()}
    arithmetic = pytest.approx(0.001)
    assert medians == {
        "memory.copy": ("GB/s", 400.0),
        "memory.triad": ("GB/s", 400.0),
        "h2d.pinned": ("GB/s", 20.0),
        "d2h.pinned": ("GB/s", 16.0),
        "h2d.pageable": ("GB/s", 5.0),
        "d2h.pageable": ("GB/s", 4.0),
        # The simulated card does one after the other: 2 / (1/20 + 1/16).
        "bidirectional.pinned": ("GB/s", pytest.approx(17.77778)),
        "fp32.fma": ("TFLOP/s", arithmetic),
        "tensor.fp16": ("TFLOP/s", arithmetic),
        "tensor.bf16": ("TFLOP/s", arithmetic),
        "tensor.tf32": ("TFLOP/s", arithmetic),
        "tensor.int8": ("TOP/s", arithmetic),
        "launch.latency": ("us", pytest.approx(3.0)),
        "memory.pattern": ("errors", 0.0),
    }


def test_report_holds_what_readers_of_it_expect(driver: Driver) -> None:
    found = driver.run()

    result = found.result
    assert (result["schema"], result["tool"], result["quick"], result["seed"]) == (1, "gpubench", True, 1)
    assert abs(result["began"] - time.time()) < 120 and result["duration_s"] > 0
    assert result["card"] == {
        "name": "NVIDIA RTX A4000",
        "pci_id": "10de:24b0",
        "uuid": "GPU-1",
        "compute_capability": "8.6",
        "sm_count": 2,
        "memory_mib": 16376,
        "bus_width_bits": 256,
        "memory_clock_max_mhz": 7001,
        "sm_clock_max_mhz": 2100,
        "link": {"generation": 4, "width": 16, "generation_max": 4, "width_max": 16},
    }
    assert (result["driver"], result["cuda_driver"]) == ("580.95.05", "13.0")
    assert result["telemetry"][0] == {
        "t": result["telemetry"][0]["t"],
        "sm_mhz": 1500,
        "memory_mhz": 7000,
        "power_w": 90.5,
        "temperature_c": 61,
        "reasons": 4,
        "link_generation": 4,
        "link_width": 16,
    }
    assert result["not_run"] == {}
    # The simulated card's two multiprocessors are taken for a part of the real one's.
    assert "MPS leaves 2 of 48 multiprocessors to this process" in result["notes"]
    assert "memory.copy: 400 GB/s (median of 2, checked)" in found.errors
    keys = {"unit", "better", "samples", "checked", "wrong", "sm_mhz", "memory_mhz", "limit", "limit_of"}
    assert all(set(metric) == keys for metric in result["metrics"].values())
    # The longest metric is long enough for its clocks to be read.
    longest = result["metrics"]["memory.pattern"]
    assert (longest["sm_mhz"], longest["memory_mhz"]) == (1500, 7000)


def test_limits_are_of_the_clock_held() -> None:
    card = {
        "name": "NVIDIA RTX A4000",
        "compute_capability": "8.6",
        "sm_count": 48,
        "bus_width_bits": 256,
        "sm_clock_max_mhz": 2100,
        "memory_clock_max_mhz": 7001,
        "link": {"generation_max": 4, "width_max": 16},
    }
    held = {"sm_mhz": 1560.0, "memory_mhz": 7001.0, "link_generation": 3.0, "link_width": 8.0}
    nothing: dict[str, float | None] = dict.fromkeys(held)

    # 448 GB/s, 19.17 TFLOP/s and, without sparsity, 76.7 TFLOP/s are the vendor's own figures for this card.
    assert gpubench.memory_limit(card, held)[0] == pytest.approx(448.0, rel=1e-3)
    assert gpubench.fp32_limit(card, held)[0] == pytest.approx(19.17, rel=1e-3)
    assert gpubench.tensor_limit("fp16", card, held)[0] == pytest.approx(76.7, rel=1e-3)
    assert gpubench.tensor_limit("tf32", card, held)[0] == pytest.approx(38.3, rel=2e-3)
    assert gpubench.tensor_limit("int8", card, held)[0] == pytest.approx(153.3, rel=2e-3)
    assert gpubench.tensor_limit("fp16", {**card, "name": "NVIDIA GeForce RTX 3090"}, held)[0] == pytest.approx(
        38.3, rel=2e-3
    )
    assert gpubench.link_limit(1, card, held)[0] == pytest.approx(7.877, rel=1e-3)
    assert gpubench.link_limit(2, card, nothing)[0] == pytest.approx(63.0, rel=1e-3)
    assert gpubench.memory_limit(card, nothing)[1] == "bus width x memory clock at the card's highest clock"
    assert gpubench.tensor_limit("fp16", {**card, "compute_capability": "12.0"}, held)[0] is None


def test_same_seed_gives_the_same_data(driver: Driver) -> None:
    assert gpubench.fma_tables(gpubench.random.Random("1")) == gpubench.fma_tables(gpubench.random.Random("1"))
    assert driver.run("--metric=fp32.fma", "--seed=77").result["seed"] == 77


def test_all_samples_are_there_and_more_come_with_time(driver: Driver) -> None:
    assert len(driver.run("--metric=memory.copy").result["metrics"]["memory.copy"]["samples"]) == 2


def test_text_that_is_sent_needs_no_file(driver: Driver) -> None:
    """As it goes through `ssh GUEST python3 -I -`."""
    words = ["--quick", "--metric=launch.latency", "--seed=3"]
    done = subprocess.run(
        [sys.executable, "-I", "-", *words],
        input=program(),
        env=driver.environment(),
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["launch.latency"]["wrong"] == 0


def test_program_is_one_for_python_3_10_and_its_library() -> None:
    tree = ast.parse(program(), feature_version=(3, 10))

    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


def test_help_works_without_a_driver() -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), "--help"], capture_output=True, text=True, check=True, cwd="/")
    assert "--memory-share" in done.stdout


# Where there is nothing to measure.


def test_no_driver_is_not_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--quick"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    result = json.loads(done.stdout)

    assert (done.returncode, result["verdict"], result["reason"]) == (4, "not run", "no CUDA driver")
    assert result["metrics"] == {} and set(result["not_run"]) == set(gpubench.METRICS)


@pytest.mark.parametrize(
    ("simulation", "verdict", "reason"),
    [
        ({"SIM_NVML": "nvmlInit_v2:9"}, "not run", "no CUDA driver is loaded: nvmlInit_v2: Unknown Error (9)"),
        ({"SIM_NVML": "nvmlDeviceGetHandleByIndex_v2:2"}, "not run", "no such GPU: "),
        ({"SIM_SERIAL": "simulated"}, "not run", "no CUDA driver: this card is simulated"),
        (
            {"SIM_NVML": "nvmlInit_v2:18"},
            "inconclusive",
            "not known whether the GPU is in use: nvmlInit_v2: Driver/library version mismatch (18)",
        ),
        (
            {"SIM_NVML": "nvmlDeviceGetComputeRunningProcesses_v3:999"},
            "inconclusive",
            "not known whether the GPU is in use: NVML lists no processes",
        ),
        ({"SIM_BUSY": 40}, "inconclusive", "GPU in use: 40 % busy, by nobody whom NVML lists"),
    ],
    ids=lambda value: next(iter(value.items()))[0] + str(next(iter(value.values()))) if isinstance(value, dict) else "",
)
def test_card_that_cannot_be_measured_is_not_touched(
    driver: Driver, simulation: dict[str, object], verdict: str, reason: str
) -> None:
    found = driver.run(**simulation)

    assert found.result["verdict"] == verdict
    assert found.reason.startswith(reason)
    assert found.result["metrics"] == {}
    assert driver.calls() == []


def test_no_device_is_not_run(driver: Driver) -> None:
    found = driver.run(SIM_FAIL="cuInit:1:100")

    assert (found.status, found.result["verdict"]) == (4, "not run")
    assert found.reason == "no CUDA device: cuInit: CUDA_ERROR_NO_DEVICE (100): text of error 100"


def test_card_that_another_holds_exclusively_is_inconclusive(driver: Driver) -> None:
    found = driver.run(SIM_FAIL="cuDevicePrimaryCtxRetain:1:46")

    assert (found.status, found.result["verdict"]) == (3, "inconclusive")
    assert found.reason.startswith("GPU in use: cuDevicePrimaryCtxRetain: CUDA_ERROR_DEVICE_UNAVAILABLE (46)")


# A card in use.


@pytest.fixture
def sleeper() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(["sleep", "60"])
    yield process  # type: ignore[misc]
    process.kill()
    process.wait()


@pytest.mark.parametrize("kind", ["compute", "mps", "graphics"])
def test_busy_card_is_left_alone(driver: Driver, tmp_path: Path, sleeper: subprocess.Popen[bytes], kind: str) -> None:
    (tmp_path / "processes").write_text(f"{kind} {sleeper.pid}\n")

    found = driver.run(SIM_PROCESSES=tmp_path / "processes")

    assert (found.status, found.result["verdict"]) == (3, "inconclusive")
    assert found.reason == f"GPU in use by PID {sleeper.pid} sleep"
    assert driver.calls() == []


def test_process_of_another_namespace_counts(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "processes").write_text("compute 4194999\n")
    assert driver.run(SIM_PROCESSES=tmp_path / "processes").reason == "GPU in use by PID 4194999 (not visible here)"


def test_own_process_is_known_under_another_number(driver: Driver, tmp_path: Path) -> None:
    """As in a container, whose numbers NVML does not know: it lists us by the host's once we have a context."""
    (tmp_path / "processes").write_text("compute 4194998\n")

    alone = driver.run("--metric=memory.copy", SIM_PID=4194999)
    used = driver.run("--metric=memory.copy", SIM_PID=4194999, SIM_PROCESSES=tmp_path / "processes")

    assert alone.result["verdict"] == "measured", alone.reason
    assert any(re.fullmatch(r"NVML knows this process, \d+, as PID 4194999", note) for note in alone.result["notes"])
    assert used.reason == "GPU in use by PID 4194998 (not visible here)"


@pytest.mark.parametrize(
    ("listed", "known"),
    [
        (["own"], "own"),
        ([4194999], 4194999),
        ([], "own"),
        # Who of them is another one, nobody can tell.
        ([4194998, 4194999], "own"),
        (["own", 4194999], "own"),
        # One that can be seen is not us.
        ([1], "own"),
        ([1, 4194999], 4194999),
    ],
    ids=str,
)
def test_own_process_is_recognized_or_not(
    monkeypatch: pytest.MonkeyPatch, listed: list[int | str], known: int | str
) -> None:
    own = os.getpid()
    new = {own if each == "own" else int(each) for each in listed}
    nvml = object.__new__(gpubench.Nvml)
    nvml.own = own
    monkeypatch.setattr(nvml, "processes", lambda: {4194997, *new})

    notes = nvml.recognize({4194997})

    assert (nvml.own, bool(notes)) == ((own, False) if known == "own" else (known, True))
    strangers = sorted({4194997, *new} - {nvml.own})
    assert [each.split()[1] for each in nvml.others()] == [str(pid) for pid in strangers]


def test_own_process_that_was_listed_before_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes then is somebody else, seen here or not."""
    nvml = object.__new__(gpubench.Nvml)
    nvml.own = os.getpid()
    monkeypatch.setattr(nvml, "processes", lambda: {os.getpid(), 4194999})

    assert nvml.recognize({os.getpid()}) == []
    assert nvml.others() == ["PID 4194999 (not visible here)"]


def test_more_processes_than_expected_are_all_seen(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "processes").write_text("".join(f"compute {4194000 + n}\n" for n in range(200)))
    reason = driver.run(SIM_PROCESSES=tmp_path / "processes").reason
    assert len(re.findall(r"PID \d+", reason)) == 200


def test_mps_server_is_no_user_of_the_card(driver: Driver, tmp_path: Path) -> None:
    server = tmp_path / "nvidia-cuda-mps-server"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", server)
    with subprocess.Popen([server, "60"]) as process:
        time.sleep(0.1)
        (tmp_path / "processes").write_text(f"compute {process.pid}\n")
        found = driver.run("--metric=launch.latency", SIM_PROCESSES=tmp_path / "processes")
        process.kill()

    assert found.result["verdict"] == "measured"


def test_who_comes_during_the_run_ends_it(driver: Driver, tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    file = tmp_path / "processes"
    file.write_text("")
    with driver.start(SIM_PROCESSES=file) as process:
        assert process.stderr is not None
        # The first metric is done.
        while "memory.copy" not in process.stderr.readline():
            pass
        file.write_text(f"compute {sleeper.pid}\n")
        output, _ = process.communicate(timeout=60)
    result = json.loads(output)

    assert (process.returncode, result["verdict"]) == (3, "inconclusive")
    assert result["reason"] == f"GPU in use by PID {sleeper.pid} sleep, who came during the run"
    assert "memory.copy" in result["metrics"] and "memory.pattern" in result["not_run"]
    assert driver.left() == ""


# Errors.


@pytest.fixture(scope="session")
def healthy(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """How often a run without errors calls each function."""
    driver = Driver(libraries, tmp_path_factory.mktemp("healthy") / "log")
    assert driver.run(*SOME).result["verdict"] == "measured"
    return Counter(driver.calls())


def test_tests_of_errors_use_every_function(healthy: Counter[str]) -> None:
    assert set(gpubench.SIGNATURES) - set(healthy) == {"cuGetErrorName"}


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("call", [name for name in gpubench.SIGNATURES if name not in (*WORDS, *FREES, RELEASE)])
def test_error_is_told_once_and_everything_freed(driver: Driver, healthy: Counter[str], call: str, which: str) -> None:
    nth = 1 if which == "first" else healthy[call]

    found = driver.run(*SOME, SIM_FAIL=f"{call}:{nth}:719")

    assert (found.status, found.result["verdict"]) == (1, "failed")
    assert found.reason.count("CUDA_ERROR_LAUNCH_FAILED (719): text of error 719") == 1
    assert found.reason.removeprefix(f"{last_metric(found.reason)}: ").startswith(f"{call}: ")
    assert driver.wrong_use() == []
    assert driver.left() == ""
    missing = set(ALL_CALLS) - set(found.result["metrics"])
    assert missing and found.result["not_run"] == dict.fromkeys(
        [name for name in ALL_CALLS if name in missing], found.reason
    )


def last_metric(reason: str) -> str:
    return next((name for name in gpubench.METRICS if reason.startswith(f"{name}: ")), "")


@pytest.mark.parametrize("call", [*FREES, RELEASE])
def test_what_cannot_be_freed_is_told_and_the_rest_freed(driver: Driver, call: str) -> None:
    found = driver.run(*SOME, SIM_FAIL=f"{call}:1:719")

    assert (found.status, found.result["verdict"]) == (1, "failed")
    assert found.reason == f"not freed: {call}: CUDA_ERROR_LAUNCH_FAILED (719): text of error 719"
    assert re.fullmatch(r"1 (memory|pinned|streams|events|modules|contexts)", driver.left())


def test_error_without_a_name_keeps_its_number(driver: Driver) -> None:
    assert driver.run(SIM_FAIL="cuInit:1:12345").reason == "cuInit: unknown error (12345): text of error 12345"


@pytest.mark.parametrize("call", ["cuMemAlloc_v2", "cuMemHostAlloc"])
def test_metric_without_memory_is_not_run_and_others_are(driver: Driver, call: str) -> None:
    found = driver.run("--metric=bidirectional.pinned", "--metric=launch.latency", SIM_FAIL=f"{call}:1:2")

    assert found.result["verdict"] == "measured"
    assert list(found.result["metrics"]) == ["launch.latency"]
    assert found.result["not_run"]["bidirectional.pinned"].startswith(f"{call}: CUDA_ERROR_OUT_OF_MEMORY (2)")
    assert driver.left() == ""


def test_card_without_room_for_buffers_says_how_much_is_needed(driver: Driver) -> None:
    found = driver.run("--metric=memory.triad", SIM_MIB=1)
    assert found.result["verdict"] == "measured"

    # None is free. Buffers that fit into the cache would measure that.
    found = driver.run("--metric=memory.triad", SIM_MIB=0)
    assert found.result["verdict"] == "not run"
    assert found.result["not_run"] == {"memory.triad": "0 MiB of the card are free, 1 MiB are needed"}


def test_ptx_that_the_driver_refuses_is_told_in_its_words(driver: Driver) -> None:
    text = program().replace(".version 8.2", ".version 9.9")
    done = subprocess.run(
        [sys.executable, "-I", "-", "--quick"],
        input=text,
        env=driver.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert json.loads(done.stdout)["reason"] == (
        "cuModuleLoadDataEx: CUDA_ERROR_INVALID_PTX (218): text of error 218; "
        "ptxas application ptx input, line 1; fatal   : no PTX"
    )
    assert driver.left() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_stopped_run_frees_everything_and_tells_what_it_has(driver: Driver, number: signal.Signals) -> None:
    with driver.start() as process:
        assert process.stderr is not None
        while "memory.copy" not in process.stderr.readline():
            pass
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    result = json.loads(output)

    assert (process.returncode, result["verdict"]) == (3, "inconclusive")
    assert result["reason"] == f"stopped by {number.name}"
    assert "memory.copy" in result["metrics"]
    assert driver.left() == ""


# Wrong results.


@pytest.mark.parametrize(
    ("kernel", "metric"),
    [
        ("memory_copy", "memory.copy"),
        ("memory_triad", "memory.triad"),
        ("cuMemcpyHtoDAsync_v2", "h2d.pinned"),
        ("cuMemcpyHtoDAsync_v2", "h2d.pageable"),
        ("cuMemcpyHtoDAsync_v2", "bidirectional.pinned"),
        ("cuMemcpyDtoHAsync_v2", "d2h.pinned"),
        ("cuMemcpyDtoHAsync_v2", "d2h.pageable"),
        ("cuMemcpyDtoHAsync_v2", "bidirectional.pinned"),
        ("fp32_fma", "fp32.fma"),
        ("tensor_fp16", "tensor.fp16"),
        ("tensor_bf16", "tensor.bf16"),
        ("tensor_tf32", "tensor.tf32"),
        ("tensor_int8", "tensor.int8"),
        ("launch_tick", "launch.latency"),
    ],
)
def test_one_wrong_byte_of_a_result_is_found(driver: Driver, kernel: str, metric: str) -> None:
    found = driver.run(f"--metric={metric}", "--metric=memory.pattern", SIM_WRONG=kernel)

    wrong = found.result["metrics"][metric]["wrong"]
    assert wrong >= 1
    assert (found.status, found.result["verdict"]) == (1, "failed")
    assert found.reason == f"{metric}: {wrong} words wrong"
    assert found.result["metrics"]["memory.pattern"]["wrong"] == 0


@pytest.mark.parametrize("kernel", ["memory_copy", "fp32_fma", "tensor_fp16"])
def test_kernel_that_does_nothing_is_found(driver: Driver, kernel: str) -> None:
    """The output is poisoned first, so what lay there before is never taken for a result."""
    metric = {"memory_copy": "memory.copy", "fp32_fma": "fp32.fma", "tensor_fp16": "tensor.fp16"}[kernel]
    found = driver.run(f"--metric={metric}", SIM_IDLE=kernel)
    assert found.result["verdict"] == "failed"
    assert found.result["metrics"][metric]["wrong"] > 1000


@pytest.mark.parametrize("word", [0, 4097, 1048575, 1835007], ids=lambda word: f"word-{word}")
@pytest.mark.parametrize("bit", [0, 31])
def test_flipped_bit_of_the_memory_is_found_and_told(driver: Driver, word: int, bit: int) -> None:
    found = driver.run("--metric=memory.pattern", SIM_FLIP=f"{word}:{bit}")

    metric = found.result["metrics"]["memory.pattern"]
    assert metric["samples"] == [1.0, 1.0]
    assert (found.status, found.result["verdict"]) == (1, "failed")
    told = [note for note in found.result["notes"] if note.startswith(f"memory.pattern: byte {word * 4:#x} ")]
    assert told
    for note in told:
        expected, seen = (int(text, 16) for text in re.findall(r"0x[0-9a-f]{8}\b", note)[-2:])
        assert expected ^ seen == 1 << bit


def test_memory_test_takes_its_share_of_free_memory_only(driver: Driver) -> None:
    found = driver.run("--metric=memory.pattern", "--memory-share=0.5", SIM_MIB=32)
    assert "memory.pattern: 16 MiB tested of 32 MiB that were free" in found.result["notes"]


# Limits of a run.


def test_run_ends_when_its_time_is_up(driver: Driver) -> None:
    found = driver.run("--metric=fp32.fma", "--metric=memory.copy", total_s=0)

    assert (found.status, found.result["verdict"]) == (4, "not run")
    assert found.result["not_run"] == dict.fromkeys(["fp32.fma", "memory.copy"], "the time was up")
    assert driver.left() == ""


def test_metric_that_runs_out_of_time_says_that_samples_are_missing(driver: Driver) -> None:
    """Between setting up and the second sample, here by a driver that takes longer to set up than the run may last."""
    found = driver.run("--metric=tensor.fp16", total_s=2.0, SIM_SLOW_MS=1200)

    assert found.result["verdict"] == "measured"
    assert len(found.result["metrics"]["tensor.fp16"]["samples"]) == 1
    assert "tensor.fp16: 1 samples instead of 2: the time was up" in found.result["notes"]


def test_card_that_stops_answering_ends_the_run(driver: Driver) -> None:
    found = driver.run("--metric=memory.copy", total_s=1.0, grace_s=2.0, SIM_HANG="cuEventSynchronize")

    assert (found.status, found.result["verdict"]) == (1, "failed")
    assert found.reason == "the card does not answer: memory.copy takes for ever"
    assert found.result["not_run"] == {"memory.copy": found.reason}
    assert found.result["telemetry"]


def test_client_of_mps_takes_all_threads_and_its_own_limits_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=1G", "HOME": "/root"})
    gpubench.environment(gpubench.parser().parse_args(["--mps-pipe=/run/nvidia-mps"]))

    assert os.environ == {
        "HOME": "/root",
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "100",
        "CUDA_MPS_PIPE_DIRECTORY": "/run/nvidia-mps",
        "CUDA_CACHE_DISABLE": "1",
        "CUDA_MODULE_LOADING": "EAGER",
    }


def test_unknown_user_is_told(driver: Driver) -> None:
    found = driver.run("--user=nobody-here")

    assert (found.status, found.result["verdict"]) == (1, "failed")
    assert found.reason.startswith("can't run as nobody-here: ")
    assert driver.calls() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_run_as_another_user_keeps_no_rights() -> None:
    code = "from verify.benchmarks.gpubench import become, os; become('nobody'); print(os.getresuid(), os.getgroups())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    uid = pwd.getpwnam("nobody").pw_uid
    assert done.stdout == f"{(uid, uid, uid)} []\n"


# Old drivers.


def test_what_an_old_nvml_lacks_is_told_and_done_without(old_libraries: Path, tmp_path: Path) -> None:
    found = Driver(old_libraries, tmp_path / "log").run("--metric=memory.copy")

    assert found.result["verdict"] == "measured"
    # From CUDA, and by the older names.
    assert found.result["card"]["bus_width_bits"] == 256
    assert found.result["telemetry"][0]["reasons"] == 4
    (note,) = (note for note in found.result["notes"] if note.startswith("not known to this driver's NVML: "))
    assert "nvmlDeviceGetMemoryBusWidth" in note and "nvmlDeviceGetCurrentClocksEventReasons" in note


def test_busy_card_is_seen_by_an_old_nvml_too(
    old_libraries: Path, tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    (tmp_path / "processes").write_text(f"compute {sleeper.pid}\n")
    found = Driver(old_libraries, tmp_path / "log").run(SIM_PROCESSES=tmp_path / "processes")
    assert found.reason == f"GPU in use by PID {sleeper.pid} sleep"
