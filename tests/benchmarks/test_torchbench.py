# SPDX-License-Identifier: MIT
"""PyTorch's benchmark: what becomes of a job, with a gpulab-run that is a script; and the job itself, with real torch.

Tests of the job take a Python that has torch, and are skipped without: GPULAB_TORCH_PYTHON names it, if it is another
than the one that runs the tests.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from operations.containers.remote import gpulab_run
from verify.benchmarks import contract, references, torchbench
from verify.hosts import whole
from verify.readers import pynvml

FOLDER = Path(torchbench.__file__).parent
MAIN = 'if __name__ == "__main__":'
#: Writes down how it was called, and does what the test says, with `command` as the words behind `--`.
GPULAB_RUN = """\
#!{python}
import json, os, signal, subprocess, sys, time
words, mark = sys.argv[1:], "gpulab-torchbench:"
with open({calls!r}, "w") as file:
    json.dump({{"words": words, "environment": dict(os.environ)}}, file)
command = words[words.index("--") + 1:]
{does}
"""
METRIC = {
    "unit": "TFLOP/s",
    "better": "higher",
    "samples": [1.0] * 6,
    "checked": True,
    "wrong": 0,
    "limit": None,
    "limit_of": "",
}
SAW = {
    "device": "cpu",
    "torch": "2.13.0+cpu",
    "setting": "matrices of 384 rows",
    "metrics": {"pytorch.gemm.fp16": METRIC},
    "not_run": {},
    "notes": ["pytorch.vae: loss 2, of a twin 2, after 9 steps 1"],
}


class Guest:
    """A gpulab-run and who else is on the card."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        #: Answers to who else is on the card, in turn.
        self.others: list[list[str]] = [[], []]
        monkeypatch.setattr(torchbench, "PROGRAM", str(folder / "gpulab-run"))
        monkeypatch.setattr(torchbench, "others", lambda containers: self.others.pop(0))

    def does(self, code: str, python: str = sys.executable) -> None:
        path = self.folder / "gpulab-run"
        path.write_text(GPULAB_RUN.format(python=python, calls=str(self.folder / "calls"), does=code))
        path.chmod(0o755)

    def prints(self, saw: dict[str, Any], then: str = "") -> None:
        self.does(f"print(mark + {json.dumps(saw)!r}, flush=True)\n{then}")

    def run(self, job: str = "pass", limit_s: float = 5.0, tenant: str | None = "astro") -> dict[str, Any]:
        """The report, as it arrives; verify can read it."""
        arguments = {"tenant": tenant, "job": job, "containers": ["milvus"], "limit_s": limit_s}
        text = json.dumps(torchbench.observe(arguments))
        contract.read(text)
        found: dict[str, Any] = json.loads(text)
        return found

    def called(self) -> dict[str, Any] | None:
        path = self.folder / "calls"
        return json.loads(path.read_text()) if path.exists() else None


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    return Guest(tmp_path, monkeypatch)


def test_report_has_what_the_job_measured(guest: Guest) -> None:
    guest.prints(SAW)
    found = guest.run()
    assert (found["verdict"], found["reason"], found["software"]) == ("measured", "", "torch 2.13.0+cpu")
    assert found["metrics"] == SAW["metrics"]
    assert (found["device"], found["setting"]) == ("cpu", SAW["setting"])
    assert found["processor"]


def test_job_is_one_of_the_tenant_and_ends_in_time(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "1000")
    guest.prints(SAW)
    found = guest.run(job="THE JOB", limit_s=5)
    call = guest.called()
    assert call is not None
    words, command = call["words"], call["words"][call["words"].index("--") + 1 :]
    assert words[words.index("--tenant") + 1] == "astro"
    assert words[words.index("--time-limit") + 1] == "30s"
    assert "--no-wait" in words
    assert command[:-1] == ["env", "PYTHONSAFEPATH=1", "python3", "-c", "THE JOB"]
    assert json.loads(command[-1]) == {"seed": found["seed"], "limit_s": 5, "mark": torchbench.MARK}
    options, unknown = gpulab_run.parser().parse_known_args(words)
    assert (options.command, options.time_limit, unknown) == (command, 30, [])
    assert "SUDO_UID" not in call["environment"]
    assert "astro" not in found["setting"]


def test_nobody_who_may_is_not_run(guest: Guest) -> None:
    guest.prints(SAW)
    found = guest.run(tenant=None)
    assert found["verdict"] == "not run"
    assert "memory_limit_mib" in found["reason"]
    assert guest.called() is None


def test_card_in_use_is_left_alone(guest: Guest) -> None:
    guest.prints(SAW)
    guest.others = [["PID 7 python3"]]
    found = guest.run()
    assert (found["verdict"], found["reason"]) == ("inconclusive", "GPU in use by PID 7 python3")
    assert guest.called() is None


def test_who_came_meanwhile_makes_it_inconclusive(guest: Guest) -> None:
    guest.prints(SAW)
    guest.others = [[], ["PID 8 python3"]]
    found = guest.run()
    assert (found["verdict"], found["reason"]) == ("inconclusive", "GPU in use by PID 8 python3")


BUSY = "gpulab-run: a job of astro runs already (gpulab-run --list)"
MISSING = "gpulab-run: missing on this guest: image x; a deploy brings it back"
KILLED = "gpulab-run: the job was killed: by hand, or for want of main memory"


@pytest.mark.parametrize(
    ("does", "verdict", "reason"),
    [
        (f"print({BUSY!r}); sys.exit(2)", "inconclusive", BUSY),
        (f"print({MISSING!r}); sys.exit(2)", "failed", f"the job ended with 2: {MISSING}"),
        (f"print({BUSY!r}); sys.exit(1)", "failed", f"the job ended with 1: {BUSY}"),
        ("pass", "failed", "the job ended with 0: it said nothing"),
        ("raise RuntimeError('no kernel image')", "failed", "RuntimeError: no kernel image"),
        (
            f"print('starting'); print({KILLED!r}); sys.exit(137)",
            "failed",
            f"the job ended with 137: starting / {KILLED}",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", "failed", "the job ended with -9: it said nothing"),
        ("print(mark + '{\"device\": \"c', end='')", "failed", "the job ended with 0: it said nothing"),
    ],
    ids=["busy", "removed", "word of the job's", "silent", "breaks", "killed", "gpulab-run killed", "cut line"],
)
def test_job_without_a_report(guest: Guest, does: str, verdict: str, reason: str) -> None:
    guest.does(does)
    found = guest.run()
    assert found["verdict"] == verdict
    assert found["reason"].endswith(reason)
    assert found["metrics"] == {}


def test_guest_without_gpulab_run_fails(guest: Guest) -> None:
    found = guest.run()
    assert found["verdict"] == "failed"
    assert found["reason"].endswith("gpulab-run: No such file or directory")


def test_wrong_result_fails_with_its_figures(guest: Guest) -> None:
    guest.prints({**SAW, "metrics": {"pytorch.gemm.fp16": {**METRIC, "wrong": 3}}})
    found = guest.run()
    assert (found["verdict"], found["reason"]) == ("failed", "pytorch.gemm.fp16: 3 wrong")
    assert found["metrics"]["pytorch.gemm.fp16"]["wrong"] == 3


def test_job_that_breaks_after_its_report_fails(guest: Guest) -> None:
    guest.prints(SAW, then="sys.exit('free(): invalid pointer')")
    found = guest.run()
    assert (found["verdict"], found["reason"]) == (
        "failed",
        "the job ended with 1 after its report: free(): invalid pointer",
    )


def test_memory_that_others_hold_makes_it_inconclusive(guest: Guest) -> None:
    guest.prints({**SAW, "no_memory": "CUDA out of memory."})
    found = guest.run()
    assert (found["verdict"], found["reason"]) == (
        "inconclusive",
        "the share's memory is not free: CUDA out of memory.",
    )


def test_only_the_end_of_what_was_said_is_told(guest: Guest) -> None:
    guest.does("print(*(f'line {n} ' + 'x' * 300 for n in range(9)), sep='\\n'); sys.exit(1)")
    reason = guest.run()["reason"]
    assert "line 8" in reason
    assert len(reason) < 500


def test_stand_in_of_an_image_is_noted(guest: Guest) -> None:
    said = "pytorch: simulated: a real PyTorch, built for the CPU"
    guest.prints(SAW, then=f"print({said!r})")
    assert guest.run()["notes"] == [said, *SAW["notes"]]


def test_terminal_hears_of_metrics_alone(guest: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    line = "pytorch.copy: 30 GB/s (median of 6, checked)"
    guest.does(f"print('UserWarning: old'); print({line!r}); print(mark + {json.dumps(SAW)!r})")
    guest.run()
    assert capsys.readouterr().err == f"{line}\n"


def test_gpulab_run_that_hangs_is_ended(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchbench, "START_S", 0)
    monkeypatch.setattr(torchbench, "END_S", 0.5)
    guest.does("print('waiting for the engine', flush=True); time.sleep(600)")
    found = guest.run(limit_s=0)
    assert (found["verdict"], found["reason"]) == ("failed", "the job ended with -15: waiting for the engine")


def test_program_goes_to_the_guest_as_one_text(guest: Guest) -> None:
    """Nothing is installed there but Python; NVML is read through a file that is sent, too."""
    guest.prints(SAW)
    text = whole(FOLDER / "torchbench.py").replace("/usr/local/bin/gpulab-run", torchbench.PROGRAM)
    (guest.folder / "pynvml.py").write_bytes(pynvml())
    arguments = {"folder": str(guest.folder), "tenant": "astro", "job": "", "containers": ["milvus"], "limit_s": 5}
    words = [sys.executable, "-I", "-S", "-c", text, json.dumps(arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd="/")
    assert contract.read(done.stdout).verdict == "measured"
    assert guest.called() is not None


def test_programs_fit_the_command_line() -> None:
    """The kernel takes 128 KiB in one argument."""
    for name in ("torchbench.py", "torchjob.py"):
        assert len(json.dumps(whole(FOLDER / name))) < 100_000


def test_noise_is_that_of_the_judge() -> None:
    tree = ast.parse((FOLDER / "torchjob.py").read_text())
    found = next(
        ast.literal_eval(each.value)
        for each in tree.body
        if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "NOISE"
    )
    assert found == {name: references.NOISE[name] for name in contract.TOOLS["pytorch"]}


# With torch.


@functools.cache
def lacks_torch(python: str) -> str:
    done = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True, check=False)
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1] if done.returncode else ""


@pytest.fixture
def python() -> str:
    """A Python that has torch."""
    found = os.environ.get("GPULAB_TORCH_PYTHON", sys.executable)
    if why := lacks_torch(found):
        pytest.skip(f"{found} has no torch ({why}): GPULAB_TORCH_PYTHON names one that has")
    return found


Broken = Callable[[str], dict[str, Any]]


@pytest.fixture
def job(guest: Guest, python: str) -> Broken:
    """Runs the job, with code that breaks something before it begins, as gpulab-run runs it; the report."""
    workspace = guest.folder / "workspace"
    workspace.mkdir()
    #: A tenant's folder may have anything in it.
    (workspace / "statistics.py").write_text("raise SystemExit('a tenant's module')")
    guest.does(
        f"at = command.index('python3')\n"
        f"sys.exit(subprocess.run([*command[:at], {python!r}, *command[at + 1:]], cwd={str(workspace)!r}).returncode)"
    )

    def run(code: str) -> dict[str, Any]:
        return guest.run(whole(FOLDER / "torchjob.py").replace(MAIN, f"{SMALLER}\n{code}\n{MAIN}"), limit_s=0.1)

    return run


#: Sizes for a test: all checks of the job, and as little of its time as can be.
SMALLER = """
torch.set_num_threads(1)
SMALL = Spectra(bins=256, hidden=(32, 16), latent=4, batch=32, count=128)
CPU = replace(CPU, warm_s=0, sample_s=0, rows=128, copy=MIB, spectra=SMALL)
"""


def wrong(found: dict[str, Any]) -> dict[str, int]:
    """What was wrong, by the last word of the metric's name."""
    return {name.rpartition(".")[2]: each["wrong"] for name, each in found["metrics"].items() if each["wrong"]}


def test_job_measures_and_is_right(job: Broken) -> None:
    found = job("")
    assert (found["verdict"], found["reason"]) == ("measured", "")
    assert found["metrics"].keys() | found["not_run"].keys() == contract.TOOLS["pytorch"].keys()
    assert found["not_run"] == {"pytorch.gemm.tf32": "TF32 is of CUDA devices"}
    assert wrong(found) == {}
    assert all(len(each["samples"]) >= 6 and each["checked"] for each in found["metrics"].values())
    assert found["software"].startswith("torch ")
    assert "128 rows" in found["setting"]
    assert "no share of the card's threads" in found["setting"]


def test_setting_has_the_share_of_threads(job: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "60")
    assert "60 % of the card's threads" in job("gemm = copy = lambda *_: None")["setting"]


MATMUL = """
right_one = torch.matmul
def matmul(left, right, out):
    right_one(left, right, out=out)
    {}
torch.matmul = matmul
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        # Each of the two checks, of the first result and of the last, sees it.
        (MATMUL.format("out[3, 5] += 1"), {"fp16": 2, "bf16": 2}),
        (MATMUL.format("out[3, 5] = float('nan')"), {"fp16": 2, "bf16": 2}),
        (MATMUL.format("out[3, 5], out[3, 6] = out[3, 5] + 1, out[3, 6] - 1"), {"fp16": 4, "bf16": 4}),
        (MATMUL.format("out.copy_(out.roll(1, 0))"), {"fp16": 2 * 64 * 100, "bf16": 2 * 64 * 100}),
        ("torch.matmul = lambda left, right, out: out", {"fp16": 2 * 64 * 128, "bf16": 2 * 64 * 128}),
    ],
    ids=["one value", "not a number", "sum kept", "rows moved", "nothing written"],
)
def test_wrong_product_is_counted(job: Broken, code: str, expected: dict[str, int]) -> None:
    found = job(code + "\ncopy = vae = lambda bench: None")
    assert found["verdict"] == "failed"
    assert wrong(found).keys() == expected.keys()
    for name, least in expected.items():
        assert wrong(found)[name] == least or wrong(found)[name] >= least > 100


COPY = """
def copy_(target, source):
    {}
torch.Tensor.copy_ = copy_
"""


@pytest.mark.parametrize(
    ("code", "least"),
    [
        (COPY.format("target[:-1] = source[:-1]"), 2),
        (COPY.format("target[:] = source; target[77] ^= 4"), 2),
        (COPY.format("target[:] = source.roll(65536)"), 2 * 200_000),
        ("torch.Tensor.copy_ = lambda target, source: None", 2 * (1 << 18)),
    ],
    ids=["last word", "one bit", "another place", "nothing"],
)
def test_wrong_copy_is_counted(job: Broken, code: str, least: int) -> None:
    found = job(code + "\ngemm = vae = lambda *_: None")
    assert found["verdict"] == "failed"
    assert wrong(found)["copy"] == least or wrong(found)["copy"] >= least > 100


FORWARD = """
right_one = Vae.forward
calls = 0
def forward(self, flux, noise):
    global calls
    calls += 1
    loss = right_one(self, flux, noise)
    return {}
Vae.forward = forward
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        # Of one step in training, that of the warm-up.
        (FORWARD.format("loss * float('nan') if calls == 3 else loss"), "nan"),
        (FORWARD.format("loss * float('inf')"), "nan"),
        ("torch.manual_seed = lambda seed: None", "other start"),
        ("torch.optim.Adam.step = lambda self: None", "no step"),
        (FORWARD.format("-loss if loss.requires_grad else loss"), "up"),
    ],
    ids=["one loss not a number", "all infinite", "other start", "nothing learned", "learned the wrong way"],
)
def test_wrong_training_is_counted(job: Broken, code: str, expected: str) -> None:
    found = job(code + "\ngemm = copy = lambda *_: None")
    assert found["verdict"] == "failed"
    if expected in ("other start", "no step"):
        assert wrong(found) == {"vae": 1}
    else:
        assert wrong(found)["vae"] >= 1


def test_broken_job_fails_with_its_last_words(job: Broken) -> None:
    found = job("def copy(bench): raise RuntimeError('CUDA error: an illegal memory access was encountered')")
    assert found["verdict"] == "failed"
    assert found["reason"].endswith("RuntimeError: CUDA error: an illegal memory access was encountered")


def test_memory_that_is_not_free_makes_the_job_inconclusive(job: Broken) -> None:
    found = job("def copy(bench): raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 512 MiB.')")
    assert found["verdict"] == "inconclusive"
    assert found["metrics"].keys() == {"pytorch.gemm.fp16", "pytorch.gemm.bf16"}


def test_torch_for_cuda_without_a_card_is_not_measured_on_the_processor(job: Broken) -> None:
    found = job("torch.version.cuda = '12.6'")
    assert found["verdict"] == "failed"
    assert found["reason"].endswith("built for CUDA 12.6, finds no card")


@pytest.fixture
def evaluated(python: str) -> Callable[[str], Any]:
    """What an expression of the job's own names is."""

    def evaluate(expression: str) -> Any:
        code = whole(FOLDER / "torchjob.py").partition(MAIN)[0] + f"\nprint(json.dumps({expression}))"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return evaluate


def test_products_are_exact_in_each_kind_of_number(evaluated: Callable[[str], Any]) -> None:
    """BF16 has whole numbers up to 256 exactly."""
    most, right, same, other = evaluated(
        "(lambda p, q, r: ("
        "int((p.left.long() @ p.right.long()).abs().max()),"
        "p.wrong((p.left.long() @ p.right.long()).bfloat16()),"
        "bool((p.left == q.left).all()),"
        "bool((p.left == r.left).all())))(*(Product(512, seed) for seed in (1, 1, 2)))"
    )
    assert 50 < most <= 128
    assert (right, same, other) == (0, True, False)


def test_spectra_are_their_seeds(evaluated: Callable[[str], Any]) -> None:
    same, other, mean, depth = evaluated(
        "(lambda a, b, c: (bool((a == b).all()), bool((a == c).all()), float(a.mean()), float(a.min())))"
        "(*(spectra(SMALL, seed, 'cpu') for seed in (1, 1, 2)))"
    )
    assert (same, other) == (True, False)
    assert 0.7 < mean < 1.3
    assert depth < 0.3


def test_sizes_fit_the_share_and_times_the_limit(evaluated: Callable[[str], Any]) -> None:
    whole_card, small, tiny = evaluated(
        "[(each.rows, each.copy // MIB, each.spectra.bins, each.total_s) for each in"
        " (fitted(CUDA, 16 << 30, 60), fitted(CUDA, 1 << 30, 60), fitted(CUDA, 256 << 20, 5))]"
    )
    assert whole_card == [8192, 512, 4096, 11.5]
    assert small == [4096, 256, 4096, 11.5]
    assert tiny[:3] == [2048, 64, 1024]
    assert tiny[3] == pytest.approx(5)


#: torch.cuda without a card: what goes to the device goes to the processor. It says nothing of CUDA's own behaviour.
SIMULATED_CARD = """
import types
from torch.overrides import TorchFunctionMode

class OnProcessor(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        def here(value):
            return "cpu" if isinstance(value, (str, torch.device)) and str(value) == "cuda" else value
        return function(*map(here, args), **{{key: here(value) for key, value in (kwargs or {{}}).items()}})

class Event:
    def __init__(self, enable_timing): assert enable_timing
    def record(self): self.at = time.perf_counter()
    def synchronize(self): pass
    def elapsed_time(self, end): return (end.at - self.at) * 1000

torch.cuda.is_available = lambda: True
torch.cuda.Event = Event
torch.cuda.get_device_capability = lambda: {capability}
torch.cuda.get_device_properties = lambda number: types.SimpleNamespace(total_memory=16 << 30)
rounds_to_tf32 = lambda device: {rounds}
CUDA = replace(CPU, rows=128)
OnProcessor().__enter__()
"""


@pytest.mark.parametrize(
    ("capability", "rounds", "not_run"),
    [
        ((8, 6), True, {}),
        ((8, 6), False, {"pytorch.gemm.tf32": "products are computed in FP32, though TF32 is allowed"}),
        (
            (7, 5),
            True,
            {
                "pytorch.gemm.tf32": "TF32 takes compute capability 8.0, got 7.5",
                "pytorch.gemm.bf16": "BF16 takes compute capability 8.0, got 7.5",
            },
        ),
    ],
)
def test_on_a_simulated_card(
    job: Broken,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    rounds: bool,
    not_run: dict[str, str],
) -> None:
    card = {"name": "simulated", "pci_id": "10de:24b0", "uuid": "GPU-simulated"}
    monkeypatch.setattr(
        torchbench, "device", lambda kind: {"device": kind, "card": card, "driver": "580.1", "processor": ""}
    )
    found = job(SIMULATED_CARD.format(capability=capability, rounds=rounds))
    assert (found["verdict"], found["device"]) == ("measured", "cuda")
    assert found["not_run"] == not_run
    assert found["metrics"].keys() | not_run.keys() == contract.TOOLS["pytorch"].keys()
    assert wrong(found) == {}
    assert "threads," not in found["setting"]
