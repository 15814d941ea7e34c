# SPDX-License-Identifier: MIT
"""From what a benchmark printed to verdicts: one of the run, one of each metric."""

from __future__ import annotations

from dataclasses import dataclass

from inventory.references import Reference
from verify.benchmarks import changes, history, references
from verify.benchmarks.contract import TOOLS, Metric, Report
from verify.benchmarks.history import History, Past, Recent, Shift
from verify.benchmarks.intervals import Interval, interval
from verify.benchmarks.references import OVER_LIMIT, Bounds, Limit, figure
from verify.verdicts import Verdict

#: There is no output to check.
UNCHECKED = frozenset({"launch.latency"})
#: What gpubench measures of the same parts of the card, without a framework.
BARE = {
    "pytorch.gemm.tf32": "tensor.tf32",
    "pytorch.gemm.fp16": "tensor.fp16",
    "pytorch.gemm.bf16": "tensor.bf16",
    "pytorch.copy": "memory.copy",
}


@dataclass(frozen=True)
class Judgement:
    """The verdict on one metric. `sentence` says why; `remarks` what else is worth knowing, of no effect on it.

    `bounds` are those that decided, a source's or a learned baseline's; `learning`: there are none yet. `ratio` is the
    median as a share of `limit`.
    """

    metric: str
    verdict: Verdict
    sentence: str
    remarks: tuple[str, ...] = ()
    unit: str = ""
    found: Interval | None = None
    reference: Reference | None = None
    bounds: Bounds | None = None
    learning: bool = False
    limit: Limit | None = None
    ratio: float | None = None
    recent: Recent | None = None
    shifts: tuple[Shift, ...] = ()


def overall(report: Report) -> tuple[Verdict, str]:
    """The verdict on the run as a whole, apart from its figures."""
    wrong = {name: metric.wrong for name, metric in report.metrics.items() if metric.wrong}
    if wrong:
        return Verdict.FAIL, "; ".join(f"{name}: {count} wrong values" for name, count in wrong.items())
    verdicts = {"measured": Verdict.PASS, "inconclusive": Verdict.INCONCLUSIVE, "not run": Verdict.NOT_RUN}
    if report.verdict != "measured":
        return verdicts.get(report.verdict, Verdict.FAIL), report.reason
    return Verdict.PASS, f"{len(report.metrics)} metrics of the {report.computed_by} in {report.duration_s:.0f} s"


def judge(
    report: Report, runs: History, revision: str, bare: Report | None = None, *, learn: bool = True
) -> list[Judgement]:
    """The verdict on each metric of the program, in its order.

    `revision`: that of the configuration under test; `bare`: what gpubench measured in the same run; `learn`: bound by
    the lab's own runs what no source bounds.
    """
    now = history.past(report, revision)
    found = []
    for name in TOOLS[report.tool]:
        metric = report.metrics.get(name)
        if metric is None:
            reason = report.not_run.get(name) or report.reason or f"{report.tool} gave no figure of it"
            found.append(Judgement(name, Verdict.NOT_RUN, f"{name}: {reason}"))
        else:
            found.append(_judge(name, metric, report, now, runs, bare, learn))
    return found


def _judge(
    name: str, metric: Metric, report: Report, now: Past | None, runs: History, bare: Report | None, learn: bool
) -> Judgement:
    seen = interval(metric.samples)
    if metric.wrong:
        words = f"{name}: {metric.wrong} values of its output are wrong, so its figure says nothing"
        return Judgement(name, Verdict.FAIL, words, unit=metric.unit, found=seen)
    if metric.unit == "errors":
        return _errors(name, metric, seen)

    limit = references.limit(name, report.card, metric)
    ratio = seen.median / limit.value if limit is not None else None
    source = references.reference(report.card, name) if report.card is not None else None
    levels = changes.levels(metric.samples, noise=references.NOISE[name])
    remarks = [*_of_limit(metric, limit, ratio), *_of_bare(name, seen, bare), *_of_source(source)]
    remarks += [*_of_levels(metric, levels), *_of_device(report)]
    words = references.measured(name, seen, metric.unit)

    def undecided(reason: str) -> Judgement:
        sentence = f"{words}: {reason}"
        return Judgement(
            name, Verdict.INCONCLUSIVE, sentence, tuple(remarks), metric.unit, seen, source, limit=limit, ratio=ratio
        )

    if report.verdict != "measured":
        return undecided(report.reason)
    if not metric.checked and name not in UNCHECKED:
        return undecided("its output was not checked")
    if limit is not None and ratio is not None and ratio > OVER_LIMIT:
        return undecided(f"more than the card can do, {figure(limit.value)} {metric.unit} ({limit.words})")

    learned, latest = None, None
    shifts: tuple[Shift, ...] = ()
    if now is not None and name in now.figures:
        learned = history.baseline(runs, now, name)
        latest = history.recent(runs, now, name)
        shifts = tuple(history.shifts(runs, now, name))
        remarks += _of_history(metric, latest, shifts)
    bounds = None
    if source is not None and source.bounded:
        bounds = Bounds(source.low, source.high, source.unit, source.source)
    elif name in references.DEFINED:
        bounds = references.DEFINED[name]
    elif learned is not None and learn:
        bounds = learned.bounds
    if bounds is not None and len({bounds.hold(level) for level in levels}) == 2:
        # Its samples are not of one distribution, so the interval of their median says nothing.
        return undecided(f"some of its levels are within what is expected, {bounds} ({bounds.source}), others are not")
    if bounds is not None:
        verdict, sentence = references.verdict(seen, bounds), references.sentence(name, seen, bounds)
    elif learned is not None and not learn:
        verdict, sentence = Verdict.PASS, f"{words}: nothing bounds it in a simulated lab"
    elif learned is not None:
        verdict = Verdict.PASS
        sentence = f"{words}: learning a baseline, run {learned.runs + 1} of {history.LEARN}"
    else:
        return undecided("too few samples to learn a baseline from")
    return Judgement(
        name,
        verdict,
        sentence,
        tuple(remarks),
        metric.unit,
        seen,
        source,
        bounds,
        bounds is None and learn,
        limit,
        ratio,
        latest,
        shifts,
    )


def _errors(name: str, metric: Metric, seen: Interval) -> Judgement:
    """Errors are not estimated from samples: a single one is one too many."""
    errors = int(sum(metric.samples))
    if errors:
        verdict, words = Verdict.FAIL, f"{errors} errors in {seen.n} passes, none expected"
    elif not metric.checked:
        verdict, words = Verdict.INCONCLUSIVE, "its output was not checked"
    else:
        verdict, words = Verdict.PASS, f"no error in {seen.n} passes"
    return Judgement(name, verdict, f"{name}: {words}", unit=metric.unit, found=seen)


def _of_limit(metric: Metric, limit: Limit | None, ratio: float | None) -> list[str]:
    if limit is None or ratio is None:
        return []
    found = [f"{ratio * 100:.1f} % of the card's limit, {figure(limit.value)} {metric.unit}: {limit.words}"]
    if metric.limit is not None and abs(metric.limit - limit.value) > 0.01 * limit.value:
        found.append(f"gpubench states another limit, {figure(metric.limit)} {metric.unit}: {metric.limit_of}")
    return found


def _of_bare(name: str, seen: Interval, bare: Report | None) -> list[str]:
    metric = bare.metrics.get(BARE.get(name, "")) if bare is not None else None
    if metric is None:
        return []
    median = interval(metric.samples).median
    share = seen.median / median * 100
    return [f"{share:.1f} % of what {BARE[name]} did in this run, {figure(median)} {metric.unit}"]


def _of_device(report: Report) -> list[str]:
    return [f"computed on the CPU, {report.processor}"] if report.device == "cpu" else []


def _of_source(source: Reference | None) -> list[str]:
    if source is None or source.reference is None:
        return []
    return [f"{figure(source.reference)} {source.unit} measured elsewhere ({source.source})"]


def _of_levels(metric: Metric, levels: list[float]) -> list[str]:
    if len(levels) == 1:
        return []
    return [f"its level changed while it was measured: {' to '.join(map(figure, levels))} {metric.unit}"]


def _of_history(metric: Metric, latest: Recent | None, shifts: tuple[Shift, ...]) -> list[str]:
    found = []
    if latest is not None and latest.unusual:
        found.append(
            f"{latest.relative * 100:+.1f} % against the last {latest.runs} runs under {latest.under} "
            f"(median {figure(latest.median)} {metric.unit}, MAD {figure(latest.mad)})"
        )
    if shifts:
        found.append(f"changed by {shifts[-1]}")
    return found
