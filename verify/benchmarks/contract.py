# SPDX-License-Identifier: MIT
"""What the benchmarks print, read from outside: one JSON object of schema 1, and words for all that it may not be."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

SCHEMA = 1

Unit = Literal["GB/s", "TFLOP/s", "TOP/s", "us", "errors", "samples/s", "tokens/s", "vectors/s", "queries/s", "ratio"]
Better = Literal["higher", "lower"]
Tool = Literal["gpubench", "mps", "pytorch", "ollama", "milvus"]
Identity = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Number = Annotated[float, Field(ge=0)]

_RATE: tuple[Unit, Better] = ("GB/s", "higher")
_FLOPS: tuple[Unit, Better] = ("TFLOP/s", "higher")
_TOKENS: tuple[Unit, Better] = ("tokens/s", "higher")
_QUERIES: tuple[Unit, Better] = ("queries/s", "higher")
#: The metrics of schema 1 by the program that measures them: unit, and which way is better. gpubench is tier 0.
TOOLS: Mapping[Tool, Mapping[str, tuple[Unit, Better]]] = MappingProxyType(
    {
        "gpubench": {
            "memory.copy": _RATE,
            "memory.triad": _RATE,
            "h2d.pinned": _RATE,
            "d2h.pinned": _RATE,
            "h2d.pageable": _RATE,
            "d2h.pageable": _RATE,
            "bidirectional.pinned": _RATE,
            "fp32.fma": _FLOPS,
            "tensor.fp16": _FLOPS,
            "tensor.bf16": _FLOPS,
            "tensor.tf32": _FLOPS,
            "tensor.int8": ("TOP/s", "higher"),
            "launch.latency": ("us", "lower"),
            "memory.pattern": ("errors", "lower"),
        },
        "mps": {
            "mps.gain": ("ratio", "higher"),
            "mps.fairness": ("ratio", "higher"),
            "mps.share": ("ratio", "higher"),
            "mps.limit": ("errors", "lower"),
        },
        "pytorch": {
            "pytorch.gemm.tf32": _FLOPS,
            "pytorch.gemm.fp16": _FLOPS,
            "pytorch.gemm.bf16": _FLOPS,
            "pytorch.copy": _RATE,
            "pytorch.vae": ("samples/s", "higher"),
        },
        "ollama": {"ollama.prompt": _TOKENS, "ollama.generation": _TOKENS},
        "milvus": {
            "milvus.build": ("vectors/s", "higher"),
            "milvus.recall": ("ratio", "higher"),
            "milvus.qps.1": _QUERIES,
            "milvus.qps.8": _QUERIES,
        },
    }
)
#: Those of all programs.
METRICS: Mapping[str, tuple[Unit, Better]] = MappingProxyType(
    {name: each for metrics in TOOLS.values() for name, each in metrics.items()}
)


class BadReport(ValueError):
    """What was printed is no report of a benchmark: one line for each thing that is wrong with it."""


class Strict(BaseModel):
    """Types as written, finite numbers. Keys that are not known are passed over: a later program may add some."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)


class Link(Strict):
    """The PCIe link as the driver reads it, and the most that card and slot together can do. Lanes in `width`."""

    generation: int | None = Field(ge=1, le=8)
    width: int | None = Field(ge=1, le=32)
    generation_max: int | None = Field(ge=1, le=8)
    width_max: int | None = Field(ge=1, le=32)


class Gpu(Strict):
    """The card that was measured. None: the driver does not tell, or a program of tier 1 does not ask."""

    name: Identity | None
    pci_id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{4}:[0-9a-f]{4}$")]
    uuid: Identity | None
    compute_capability: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,2}\.[0-9]$")] | None = None
    sm_count: int | None = Field(default=None, ge=1)
    memory_mib: int | None = Field(default=None, ge=1)
    bus_width_bits: int | None = Field(default=None, ge=1)
    memory_clock_max_mhz: float | None = Field(default=None, gt=0)
    sm_clock_max_mhz: float | None = Field(default=None, gt=0)
    link: Link | None = None


class Metric(Strict):
    """The samples of one measurement, in the order in which they were taken.

    `checked`: what the kernel left was compared with what it should have; `wrong`: how many values differed. `sm_mhz`
    and `memory_mhz`: the clocks held meanwhile. `limit`: the most that the card could do, by gpubench's own count.
    """

    unit: Unit
    better: Better
    samples: list[Number] = Field(min_length=1)
    checked: bool
    wrong: int = Field(ge=0)
    sm_mhz: float | None = Field(default=None, gt=0)
    memory_mhz: float | None = Field(default=None, gt=0)
    limit: float | None = Field(default=None, gt=0)
    limit_of: str = ""

    @model_validator(mode="after")
    def possible(self) -> Metric:
        if self.unit == "errors":
            if any(sample != int(sample) for sample in self.samples):
                raise ValueError("whole numbers of errors in `samples`")
        elif 0 in self.samples and self.unit != "ratio":
            raise ValueError(f"`samples` above 0, got 0 {self.unit}")
        if self.wrong and not self.checked:
            raise ValueError(f"`checked` beside {self.wrong} wrong values")
        return self


class Report(Strict):
    """One run of a benchmark. Without the card's driver it has no card and no metric. `began`: seconds since the epoch.

    `device`: what computed; on a CPU there is a `processor` in the place of card and driver. `software`: what was
    measured, with its version. `setting`: sizes, model, index: figures of other settings are not comparable. `series`:
    points for a drawing.
    """

    version: Literal[1] = Field(alias="schema")
    tool: Tool
    began: float = Field(gt=0)
    duration_s: Number
    quick: bool
    seed: int
    device: Literal["cuda", "cpu"] = "cuda"
    card: Gpu | None = None
    driver: str | None = None
    cuda_driver: str | None = None
    processor: str = ""
    software: str = ""
    setting: str = ""
    verdict: Literal["measured", "inconclusive", "not run", "failed"]
    reason: str = ""
    metrics: dict[str, Metric] = {}
    not_run: dict[str, str] = {}
    telemetry: list[Any] = []
    series: dict[str, list[tuple[float, float]]] = {}
    notes: list[str] = []

    @property
    def computed_by(self) -> str:
        """The card's or the processor's name; empty: nothing computed."""
        if self.device == "cpu":
            return self.processor
        return (self.card.name or self.card.pci_id) if self.card is not None else ""

    @field_validator("card", mode="before")
    @classmethod
    def seen(cls, value: Any) -> Any:
        """A card of which nothing at all was read is none."""
        known = isinstance(value, dict) and any(each is not None for key, each in value.items() if key != "link")
        return value if known or not isinstance(value, dict) else None

    @model_validator(mode="after")
    def known(self) -> Report:
        metrics = TOOLS[self.tool]
        for name, metric in self.metrics.items():
            if name not in metrics:
                raise ValueError(f"metrics of {self.tool} in schema {SCHEMA}, got {name!r}")
            if (metric.unit, metric.better) != metrics[name]:
                unit, better = metrics[name]
                raise ValueError(f"{name} in {unit}, {better} is better; got {metric.unit}, {metric.better}")
        return self

    @model_validator(mode="after")
    def whole(self) -> Report:
        by = ("card", "driver") if self.device == "cuda" else ("processor",)
        if self.verdict == "measured":
            missing = [key for key in (*by, "metrics") if not getattr(self, key)]
            if missing:
                raise ValueError(f"`{missing[0]}` beside verdict 'measured'")
        elif not self.reason:
            raise ValueError(f"a `reason` beside verdict {self.verdict!r}")
        if self.metrics and not all(getattr(self, key) for key in by):
            raise ValueError(f"{' and '.join(f'`{key}`' for key in by)} beside `metrics`")
        if twice := sorted(self.metrics.keys() & self.not_run.keys()):
            raise ValueError(f"each metric in `metrics` or in `not_run`, got {twice[0]} in both")
        return self


def read(text: str | bytes) -> Report:
    """The report that a benchmark printed.

    Raises:
        BadReport: it is none; each line of the message names a key, what was expected and what was found.
    """
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        raise BadReport("\n".join(_words(each) for each in error.errors())) from None


def _words(error: Any) -> str:
    key = ".".join(map(str, error["loc"])) or "the report"
    got = repr(error["input"])
    got = got if len(got) <= 60 else f"{got[:57]}..."
    match error["type"]:
        case "json_invalid":
            return f"{key}: expected JSON: {error['ctx']['error']}; got {got}"
        case "missing":
            return f"{key}: missing"
        case "value_error":
            return f"{key}: expected {error['ctx']['error']}"
        case "model_type" | "model_attributes_type":
            return f"{key}: expected an object, got {got}"
        case "string_pattern_mismatch":
            return f"{key}: expected text of the form {error['ctx']['pattern']}, got {got}"
        case "too_short":
            return f"{key}: expected at least {error['ctx']['min_length']} of them, got {got}"
    return f"{key}: expected {error['msg'].removeprefix('Input should be ')}, got {got}"
