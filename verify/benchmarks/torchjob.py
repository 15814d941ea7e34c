# SPDX-License-Identifier: MIT
"""Runs in a job's container, with torch: measures the card, or the processor where there is none, and checks what comes
out.

Its text is handed to the job, so it keeps to torch and the standard library. Progress goes to stdout, and behind the
mark that it is given one line of JSON.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from verify.benchmarks.intervals import stop

MIB = 1 << 20
#: Samples of a metric at least: fewer give no interval of 95 %.
LEAST = 6
#: The noise that a metric is allowed, as a share of its median: references.NOISE has the same.
NOISE = {
    "pytorch.gemm.tf32": 0.02,
    "pytorch.gemm.fp16": 0.02,
    "pytorch.gemm.bf16": 0.02,
    "pytorch.copy": 0.02,
    "pytorch.vae": 0.03,
}


@dataclass(frozen=True)
class Spectra:
    """The network and what it is trained with: flux bins, widths of the hidden layers, latent numbers, spectra."""

    bins: int
    hidden: tuple[int, int]
    latent: int
    batch: int
    count: int


@dataclass(frozen=True)
class Effort:
    """What a kind of device is given: seconds untimed, of a sample and of each metric; rows of the square matrices;
    bytes of a copy.
    """

    warm_s: float
    sample_s: float
    gemm_s: float
    copy_s: float
    vae_s: float
    rows: int
    copy: int
    spectra: Spectra

    @property
    def total_s(self) -> float:
        return 3 * self.gemm_s + self.copy_s + self.vae_s


SMALL = Spectra(bins=1024, hidden=(256, 64), latent=8, batch=128, count=1024)
LARGE = Spectra(bins=4096, hidden=(1024, 256), latent=8, batch=1024, count=8192)
#: Bytes of a share below which the small network is trained.
LARGE_TAKES = 1024 * MIB
#: FP16 has no fast way on most processors: larger matrices would take seconds.
CPU = Effort(0.1, 0.01, 0.5, 0.5, 1.5, 384, 64 * MIB, SMALL)
CUDA = Effort(0.5, 0.025, 2.0, 1.5, 4.0, 8192, 512 * MIB, LARGE)


def fitted(effort: Effort, budget: int | None, limit_s: float) -> Effort:
    """Sizes of which each metric's take half of `budget` bytes at most (None: no bound), and `limit_s` of sampling."""
    scale = min(1.0, limit_s / effort.total_s)
    rows, copy, spectra = effort.rows, effort.copy, effort.spectra
    if budget is not None:
        # Two operands and the result of FP32; source and copy.
        while 3 * 4 * rows**2 > budget // 2 and rows > 512:
            rows //= 2
        while 2 * copy > budget // 2 and copy > 16 * MIB:
            copy //= 2
        spectra = spectra if budget >= LARGE_TAKES else SMALL
    return replace(
        effort,
        gemm_s=effort.gemm_s * scale,
        copy_s=effort.copy_s * scale,
        vae_s=effort.vae_s * scale,
        rows=rows,
        copy=copy,
        spectra=spectra,
    )


class Bench:
    """One device and the metrics of a run on it."""

    def __init__(self, device: str, effort: Effort, seed: int) -> None:
        self.device, self.effort, self.seed = device, effort, seed
        self.metrics: dict[str, dict[str, Any]] = {}
        self.not_run: dict[str, str] = {}
        self.notes: list[str] = []

    def seconds(self, once: Callable[[], None], times: int) -> float:
        """How long so many take one after another: by the card's own clock, or the processor's."""
        if self.device == "cpu":
            began = time.perf_counter()
            for _ in range(times):
                once()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            once()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def measure(
        self,
        name: str,
        unit: str,
        limit_s: float,
        once: Callable[[], None],
        work: float,
        poison: Callable[[], None],
        check: Callable[[], int],
    ) -> None:
        """Samples of `work` a second, in `unit`. Results are checked of the first and of the last; `poison` makes the
        place of a result wrong before it.
        """
        poison()
        once()
        wrong, took = check(), math.inf
        end = time.monotonic() + self.effort.warm_s
        while took == math.inf or time.monotonic() < end:
            took = min(took, self.seconds(once, 1))
        times = max(1, math.ceil(self.effort.sample_s / took))
        samples: list[float] = []
        began = time.monotonic()
        while len(samples) < LEAST or not stop(
            samples, noise=NOISE[name], elapsed_s=time.monotonic() - began, limit_s=limit_s
        ):
            poison()
            samples.append(work * times / self.seconds(once, times))
        wrong += check()
        self.metrics[name] = {
            "unit": unit,
            "better": "higher",
            "samples": samples,
            "checked": True,
            "wrong": wrong,
            "limit": None,
            "limit_of": "",
        }
        checked = f"{wrong} wrong" if wrong else "checked"
        print(f"{name}: {statistics.median(samples):.6g} {unit} (median of {len(samples)}, {checked})", flush=True)


#: The largest operand, and how many products are left in each sum: with them no result passes 128, so that BF16 has it
#: exactly, as all partial sums are whole numbers that FP32 has exactly.
MOST, TERMS = 4, 32
#: Rows that are computed again where a row is wrong.
ROWS = 64
#: Rows that are widened at a time: whole matrices would take gigabytes.
BLOCK = 512


class Product:
    """Two random matrices of small whole numbers whose product is exact in BF16, FP16 and TF32, and what is known of
    it.

    Neighbouring columns of the left one cancel, but for 32 places a row, and rows of the right one are the same in
    pairs: all numbers are random, and sums stay small. A result is known by its product with a random vector x: the
    processor has A (B x) exactly, in float64, and a row that is wrong passes once in about a million times.
    """

    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def integers(low: int, high: int, *shape: int, kind: Any = torch.int64) -> Any:
            return torch.randint(low, high, shape, generator=generator, dtype=kind)

        half = rows // 2
        left, right = (integers(-MOST, MOST + 1, *shape, kind=torch.int8) for shape in ((rows, half), (half, rows)))
        # One in each stripe, so that none falls on another.
        stripe = half // TERMS
        places = torch.arange(TERMS) * stripe + integers(0, stripe, rows, TERMS)
        signs = 2 * integers(0, 2, rows, TERMS, kind=torch.int8) - 1
        rest = torch.zeros(rows, half, dtype=torch.int8).scatter_(1, places, signs)
        self.rows = rows
        self.left = torch.stack((left, rest - left), dim=2).reshape(rows, rows)
        self.right = right.repeat_interleave(2, dim=0)
        self.x = integers(1, 1 << 20, rows).double()
        self.known = by_vector(self.left, by_vector(self.right, self.x))

    def wrong(self, result: Any) -> int:
        """Values of a result that are wrong; where more than 64 rows have some, those of 64, or a one for each row."""
        found = result.cpu()
        bad = (by_vector(found, self.x) != self.known).nonzero().flatten()
        if not len(bad):
            return 0
        some = bad[:ROWS]
        exact = torch.zeros(len(some), self.rows, dtype=torch.float64)
        for at in range(0, self.rows, BLOCK):
            exact += self.left[some, at : at + BLOCK].double() @ self.right[at : at + BLOCK].double()
        return max(len(bad), int((found[some].double() != exact).sum()))


def by_vector(matrix: Any, vector: Any) -> Any:
    """A matrix times a vector, in float64 on the processor."""
    return torch.cat([matrix[at : at + BLOCK].double() @ vector for at in range(0, len(matrix), BLOCK)])


def gemm(bench: Bench, product: Product, kind: str) -> None:
    """TFLOP/s of torch.matmul in one kind of numbers."""
    name = f"pytorch.gemm.{kind}"
    if kind == "tf32" and bench.device == "cpu":
        bench.not_run[name] = "TF32 is of CUDA devices"
        return
    if bench.device == "cuda" and kind != "fp16" and (found := torch.cuda.get_device_capability()) < (8, 0):
        bench.not_run[name] = f"{kind.upper()} takes compute capability 8.0, got {found[0]}.{found[1]}"
        return
    # "high" is what allow_tf32 was.
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    if kind == "tf32" and not rounds_to_tf32(bench.device):
        bench.not_run[name] = "products are computed in FP32, though TF32 is allowed"
        return
    numbers = {"tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    left, right = (each.to(bench.device).to(numbers) for each in (product.left, product.right))
    result = torch.empty_like(left)
    bench.measure(
        name,
        "TFLOP/s",
        bench.effort.gemm_s,
        once=lambda: void(torch.matmul(left, right, out=result)),
        work=2 * product.rows**3 / 1e12,
        poison=lambda: void(result.fill_(float("nan"))),
        check=lambda: product.wrong(result),
    )


def rounds_to_tf32(device: str) -> bool:
    """Are products of FP32 computed in TF32? It takes 1 + 2**-12 as 1."""
    fine = torch.full((1024, 1024), 1 + 2**-12, device=device)
    return float((fine @ fine).max()) < 1024 * (1 + 2**-12)


def void(_: object) -> None:
    """Calls that return a tensor are made for what they write."""


#: 32-bit words after which the data of a copy repeats. A prime: data that comes from a wrong place does not look right.
PERIOD = 65521
#: A word that the data does not have.
POISON = -(2**31)


def copy(bench: Bench) -> None:
    """GB/s, read and written, of a copy on the device."""
    generator = torch.Generator().manual_seed(bench.seed)
    tile = torch.randint(1 - 2**31, 2**31, (PERIOD,), generator=generator, dtype=torch.int64).to(torch.int32)
    words = bench.effort.copy // 4
    source = tile.to(bench.device).repeat(words // PERIOD + 1)[:words]
    target = torch.empty_like(source)
    block = tile.repeat(256)

    def check() -> int:
        wrong = 0
        for at in range(0, words, len(block)):
            found = target[at : at + len(block)].cpu()
            wrong += int((found != block[: len(found)]).sum())
        return wrong

    bench.measure(
        "pytorch.copy",
        "GB/s",
        bench.effort.copy_s,
        once=lambda: void(target.copy_(source)),
        work=2 * 4 * words / 1e9,
        poison=lambda: void(target.fill_(POISON)),
        check=check,
    )


#: Absorption lines of a spectrum, and the noise of its flux beside a continuum of about 1.
LINES, SIGMA = 24, 0.05


def spectra(sizes: Spectra, seed: int, device: str) -> Any:
    """Spectra as a survey of galaxies has them: a smooth continuum, the same absorption lines in all, each a little
    shifted, of other depths and widths, and noise. A row is a spectrum, its flux over even bins.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Any:
        return (low + (high - low) * torch.rand(*shape, generator=generator)).to(device)

    grid, count = torch.linspace(0, 1, sizes.bins, device=device), sizes.count
    flux = torch.ones(count, sizes.bins, device=device)
    for wave in (1, 2, 3):
        phase = 2 * torch.pi * uniform(0, 1, count, 1)
        flux += uniform(-0.3, 0.3, count, 1) / wave * torch.cos(torch.pi * wave * grid + phase)
    shift, broad = uniform(-0.02, 0.02, count, 1), uniform(1, 2, count, 1)
    for _ in range(LINES):
        place, width, most = uniform(0.03, 0.97, 1), uniform(0.002, 0.005, 1), uniform(0.2, 0.7, 1)
        profile = torch.exp(-0.5 * ((grid - place - shift) / (width * broad)) ** 2)
        flux *= 1 - most * uniform(0.3, 1, count, 1) * profile
    noise = torch.randn(count, sizes.bins, generator=generator)
    return flux.add_(noise.to(device), alpha=SIGMA)


class Vae(nn.Module):
    """A variational autoencoder of fully connected layers."""

    def __init__(self, sizes: Spectra) -> None:
        super().__init__()
        wide, narrow = sizes.hidden
        self.encoder = nn.Sequential(
            nn.Linear(sizes.bins, wide),
            nn.ReLU(),
            nn.Linear(wide, narrow),
            nn.ReLU(),
            nn.Linear(narrow, 2 * sizes.latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(sizes.latent, narrow), nn.ReLU(), nn.Linear(narrow, wide), nn.ReLU(), nn.Linear(wide, sizes.bins)
        )

    def forward(self, flux: Any, noise: Any) -> Any:
        """The negative of the evidence's lower bound (ELBO) for a bin, without its constant."""
        mean, log_variance = self.encoder(flux).chunk(2, dim=1)
        found = self.decoder(mean + noise * torch.exp(log_variance / 2))
        miss = ((flux - found) / SIGMA).square().sum(dim=1) / 2
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
        return (miss + divergence).mean() / flux.shape[1]


def vae(bench: Bench) -> None:
    """Samples a second of training: forward, backward, and Adam's step, in FP32.

    Counted as wrong: each loss that is not finite; a network from the same seed whose first loss is another; a loss
    that training has not made lower.
    """
    torch.set_float32_matmul_precision("highest")
    sizes = bench.effort.spectra
    data = spectra(sizes, bench.seed, bench.device)
    batches = data.split(sizes.batch)

    def fresh() -> Any:
        torch.manual_seed(bench.seed)
        return Vae(sizes).to(bench.device)

    def loss_of(model: Any) -> float:
        generator = torch.Generator().manual_seed(bench.seed)
        noise = torch.randn(sizes.batch, sizes.latent, generator=generator).to(bench.device)
        with torch.no_grad():
            return float(model(batches[0], noise))

    twin, model = fresh(), fresh()
    first, again = loss_of(model), loss_of(twin)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses: list[Any] = []
    taken = 0

    def step() -> None:
        nonlocal taken
        flux = batches[taken % len(batches)]
        taken += 1
        optimizer.zero_grad(set_to_none=True)
        loss = model(flux, torch.randn(sizes.batch, sizes.latent, device=bench.device))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    def check() -> int:
        unfit = int((~torch.isfinite(torch.stack(losses))).sum())
        losses.clear()
        return unfit

    bench.measure(
        "pytorch.vae", "samples/s", bench.effort.vae_s, step, work=sizes.batch, poison=lambda: None, check=check
    )
    last = loss_of(model)
    bench.metrics["pytorch.vae"]["wrong"] += (first != again) + (not last < first)
    bench.notes.append(f"pytorch.vae: loss {first:.6g}, of a twin {again:.6g}, after {taken} steps {last:.6g}")


def setting(bench: Bench) -> str:
    """What figures are comparable only with."""
    effort = bench.effort
    sizes = effort.spectra
    layers = "-".join(map(str, (sizes.bins, *sizes.hidden, sizes.latent)))
    parameters = sum(each.numel() for each in Vae(sizes).parameters())
    words = [
        f"matrices of {effort.rows} rows",
        f"copy of {effort.copy // MIB} MiB",
        f"VAE {layers} of {parameters} parameters in FP32, batches of {sizes.batch}",
    ]
    if bench.device == "cpu":
        words.append(f"{torch.get_num_threads()} threads")
    percentage = os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
    words.append(f"{percentage} % of the card's threads" if percentage else "no share of the card's threads")
    return ", ".join(words)


def share() -> int:
    """Bytes of the card that torch may have here: its hook caps torch's allocator at that fraction."""
    total = int(torch.cuda.get_device_properties(0).total_memory)
    return int(total * float(os.environ.get("GPULAB_TORCH_MEMORY_FRACTION") or 1))


def measured(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments`: `seed` of all data and `limit_s`, the seconds of sampling.

    Raises:
        SystemExit: a torch for CUDA that finds no card.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and torch.version.cuda:
        raise SystemExit(f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no card")
    effort = (
        fitted(CUDA, share(), arguments["limit_s"]) if device == "cuda" else fitted(CPU, None, arguments["limit_s"])
    )
    bench = Bench(device, effort, arguments["seed"])
    found = {"device": device, "torch": torch.__version__, "setting": setting(bench)}
    try:
        product = Product(effort.rows, arguments["seed"])
        for kind in ("tf32", "fp16", "bf16"):
            gemm(bench, product, kind)
        copy(bench)
        vae(bench)
    except torch.cuda.OutOfMemoryError as error:
        # Sizes fit the share, so that others have the memory.
        found["no_memory"] = str(error).splitlines()[0]
    return {**found, "metrics": bench.metrics, "not_run": bench.not_run, "notes": bench.notes}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(given["mark"] + json.dumps(measured(given)), flush=True)
