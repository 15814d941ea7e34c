# SPDX-License-Identifier: MIT
"""How clients of MPS share a card: what sharing gains, whether it is fair, and whether limits are kept.

Goes to the guest, as root, and prints one report. The clients are processes of gpubench.py --load, one for each limit,
which end when this one does. docs/benchmarks.md tells what is measured and how.
"""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from verify.benchmarks.host import device, entry, in_use, nvml_from, others, report, ruled, say
from verify.benchmarks.intervals import stop

#: Seconds of a launch, and of what is counted of each client for one sample.
SLICE_S, WINDOW_S = 0.01, 0.15
#: Seconds of work before the first sample, for the clocks to rise.
WARM_S = 0.3
#: The fewest samples of a metric, and how narrow its interval is to be, as a share of the median.
LEAST, PRECISE = 6, 0.03
#: Seconds for a client to make its context, and then to answer or to end.
BEGIN_S, REPLY_S, END_S = 30.0, 10.0, 8.0
#: Seconds that a process which has just ended may still be listed.
SETTLE_S = 2.0
#: Multiprocessors that MPS gives together, at most: the hardware's own pairs.
UNIT = 2
#: What is tried where nothing else is asked for. A quarter of the limit holds a context and a little more.
PERCENTAGES, LIMIT_MIB = (25.0, 50.0, 75.0, 100.0), 1024
#: All small clients together take half of the card's multiprocessors, where there are four.
SMALL = 8
CONTROL = "nvidia-cuda-mps-control"
#: Every metric: unit, and which is better.
METRICS = {
    "mps.gain": ("ratio", "higher"),
    "mps.fairness": ("ratio", "higher"),
    "mps.share": ("ratio", "higher"),
    "mps.limit": ("errors", "lower"),
}


class Over(Exception):
    """The run is over; `verdict` is what becomes of it and the text is the reason."""

    def __init__(self, reason: str, verdict: str = "failed") -> None:
        super().__init__(reason)
        self.verdict = verdict


# What the figures are, of what was counted.


def jain(rates: Sequence[float]) -> float:
    """Jain's index of fairness: 1 where all get the same, 1/n where one gets all."""
    squares = len(rates) * sum(rate * rate for rate in rates)
    return sum(rates) ** 2 / squares if squares else 0.0


def gain(together: Sequence[float], single: Sequence[float]) -> float:
    """What all do together, as a multiple of what one of them does alone on average."""
    return sum(together) / statistics.fmean(single)


def rate(counted: Mapping[str, Any]) -> float:
    """Operations a second."""
    return float(counted["operations"] / counted["seconds"])


def per_clock(counted: Sequence[Mapping[str, Any]]) -> list[float]:
    """Operations a second and MHz; a second alone where NVML did not tell the clock of each.

    A part of the card draws less power and may be clocked higher, which is no matter of its share.
    """
    known = all(each["sm_mhz"] for each in counted)
    return [rate(each) / (each["sm_mhz"] if known else 1) for each in counted]


def entitled(percent: float, given: int, highest: float, highest_given: int) -> float:
    """The share of the highest client's throughput that one of `percent` is to have.

    MPS rounds a percentage to whole multiprocessors: those given count where they are as near as that, else what was
    asked for.
    """
    asked, share = percent / highest, given / highest_given
    return share if abs(share - asked) * highest_given <= UNIT else asked


def nearness(shares: Sequence[float], expected: Sequence[float]) -> float:
    """1 less the largest distance of a share from the expected one; 1 is as it should be, 0 is the worst."""
    return max(0.0, 1 - max(abs(a - b) for a, b in zip(shares, expected, strict=True)))


def capped(percentages: Sequence[float], most: float) -> list[float]:
    """The percentages in order, none above what the server gives, which is the highest of them."""
    return sorted({*(percent for percent in percentages if percent < most), most})


def small(multiprocessors: int) -> int:
    """Blocks of a client that leaves most of the card idle, one block to a multiprocessor."""
    return max(1, multiprocessors // SMALL)


def tries(limit_mib: int) -> Iterator[tuple[int, bool]]:
    """MiB to ask for, and whether they are to be had. A quarter is: the context's own memory counts as well."""
    while True:
        yield limit_mib + 1, False
        yield limit_mib // 4, True


# Clients.


class Client:
    """A process of gpubench.py --load. It ends with its standard input, so with this process, however that ends."""

    def __init__(self, arguments: Mapping[str, Any], threads: float, memory_limit: int | None = None) -> None:
        words = [sys.executable, "-I", arguments["program"], f"--load={SLICE_S}", f"--threads={threads:g}"]
        words += [f"--mps-pipe={arguments['pipe']}", f"--user={arguments['user']}"]
        if memory_limit is not None:
            words.append(f"--memory-limit={memory_limit}")
        self.threads = threads
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.rest = b""
        self.multiprocessors = 0
        #: Who else was on the card when it came.
        self.others: list[str] = []

    def greet(self) -> None:
        """Take in what it sees of the card.

        Raises:
            Over: it is no client of MPS, or has no card.
        """
        seen = self.answer(BEGIN_S)
        if seen["mps"] is False:
            raise Over(f"PID {self.process.pid} uses the card past MPS, whose daemon answers")
        self.multiprocessors, self.others = seen["multiprocessors"], seen["others"]

    def tell(self, do: str, **more: Any) -> None:
        assert self.process.stdin is not None
        # One that has ended is found by its answer.
        if not self.process.stdin.closed:
            with suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")

    def answer(self, limit_s: float) -> dict[str, Any]:
        """Its next line.

        Raises:
            Over: with its own reason, or it has ended or does not answer.
        """
        assert self.process.stdout is not None
        end = time.monotonic() + limit_s
        while b"\n" not in self.rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise Over(f"client PID {self.process.pid} did not answer within {limit_s:.0f} s")
            more = os.read(self.process.stdout.fileno(), 65536)
            if not more:
                raise Over(f"client PID {self.process.pid} ended with status {self.end()} and without a word")
            self.rest += more
        line, _, self.rest = self.rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise Over(found["error"], found["verdict"])
        return found

    def end(self) -> int:
        """End it, by force if it does not go; its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def ask(clients: Sequence[Client], do: str, **more: Any) -> list[dict[str, Any]]:
    """Tell all of them before the first has to answer."""
    for client in clients:
        client.tell(do, **more)
    return [client.answer(REPLY_S) for client in clients]


class Run:
    """The clients of one run, and what they said."""

    def __init__(self, arguments: Mapping[str, Any], most: float, result: dict[str, Any]) -> None:
        self.arguments, self.most, self.result = arguments, most, result
        self.wrong = 0
        #: Who was on the card before, and may be.
        self.known: set[str] | None = None
        self.deadline = time.monotonic() + arguments["limit_s"]

    @contextmanager
    def clients(self, threads: Sequence[float], memory_limit: int | None = None) -> Iterator[list[Client]]:
        """One client for each share of the threads; the last has the limit of memory."""
        started: list[Client] = []
        try:
            for number, percent in enumerate(threads, 1):
                started.append(Client(self.arguments, percent, memory_limit if number == len(threads) else None))
            for client in started:
                client.greet()
                self.look(client.others)
            yield started
        finally:
            for client in started:
                assert client.process.stdin is not None
                client.process.stdin.close()
            for client in started:
                client.end()

    def look(self, found: Sequence[str]) -> None:
        """Go on only while nobody else has come.

        Raises:
            Over: somebody came to the card.
        """
        if self.known is None:
            self.known = set(found)
        if came := sorted(set(found) - self.known):
            raise Over(f"{in_use(came)}, who came during the run", "inconclusive")

    def rounds(self, client: Client, blocks: int | None = None) -> int:
        """How often the kernel's loop is to turn for a slice, the same for every client. The card is warm after."""
        [found] = ask([client], "start", blocks=blocks, rounds=None)
        time.sleep(WARM_S)
        self.stop([client])
        return int(found["rounds"])

    def stop(self, clients: Sequence[Client]) -> None:
        for found in ask(clients, "stop"):
            self.wrong += found["wrong"]
            self.look(found["others"])

    def window(self, clients: Sequence[Client], rounds: int, blocks: int | None = None) -> list[dict[str, Any]]:
        """What each did while all of them worked: all have begun before the first counts, and go on after the last."""
        ask(clients, "start", blocks=blocks, rounds=rounds)
        found = self.counted(clients)
        self.stop(clients)
        return found

    def counted(self, clients: Sequence[Client]) -> list[dict[str, Any]]:
        """The same of clients that work already, and go on."""
        ask(clients, "count")
        time.sleep(WINDOW_S)
        found = ask(clients, "halt")
        self.wrong += sum(each["wrong"] for each in found)
        return found

    def metric(self, name: str, once: Callable[[], float]) -> None:
        """Sample until the median is known well enough, for a fair part of the time that is left."""
        unit, better = METRICS[name]
        begin, samples, self.wrong = time.monotonic(), [], 0
        left = len(METRICS) - len(self.result["metrics"]) - len(self.result["not_run"])
        limit_s = (self.deadline - begin) / left
        enough = False
        while not enough:
            samples.append(float(f"{once():.6g}"))
            now = time.monotonic()
            # Errors are counted, not estimated.
            enough = len(samples) >= LEAST and (
                unit == "errors" or bool(stop(samples, noise=PRECISE, elapsed_s=now - begin, limit_s=limit_s))
            )
            if now > self.deadline and not enough:
                self.result["notes"].append(f"{name}: {len(samples)} samples instead of {LEAST}: the time was up")
                break
        self.result["metrics"][name] = entry(unit, samples, self.wrong, better)
        say(f"{name}: {statistics.median(samples):.4g} {unit} (median of {len(samples)}, {self.wrong} words wrong)")
        if self.wrong:
            raise Over(f"{name}: {self.wrong} words wrong")


def measure_gain(run: Run, count: int) -> None:
    """Small clients, each with all of the threads."""
    with run.clients([run.most] * count) as clients:
        blocks = small(clients[0].multiprocessors)
        rounds = run.rounds(clients[0], blocks)

        def once() -> float:
            single = [rate(run.window([client], rounds, blocks)[0]) for client in clients]
            return gain([rate(each) for each in run.window(clients, rounds, blocks)], single)

        run.metric("mps.gain", once)


def measure_fairness(run: Run, count: int) -> None:
    """Clients that fill their equal parts of the card."""
    with run.clients([min(100 / count, run.most)] * count) as clients:
        rounds = run.rounds(clients[0])
        rows: list[list[float]] = []

        def once() -> float:
            rows.append([rate(each) for each in run.window(clients, rounds)])
            return jain(rows[-1])

        run.metric("mps.fairness", once)
    shares = zip(*[[each / sum(row) for each in row] for row in rows], strict=True)
    run.result["series"]["mps.together"] = [
        [float(number), round(statistics.median(share), 6)] for number, share in enumerate(shares, 1)
    ]


def measure_share(run: Run, percentages: Sequence[float]) -> None:
    """One client at a time, with more and more of the threads."""
    if len(percentages) < 2:
        run.result["not_run"]["mps.share"] = f"the server gives {run.most:g} % and nothing below it was asked for"
        return
    with run.clients(percentages) as clients:
        rounds = run.rounds(clients[-1])
        highest = clients[-1]
        expected = [
            entitled(each.threads, each.multiprocessors, highest.threads, highest.multiprocessors) for each in clients
        ]
        rows: list[list[float]] = []

        def once() -> float:
            rates = per_clock([run.window([client], rounds)[0] for client in clients])
            rows.append([each / rates[-1] for each in rates])
            return nearness(rows[-1], expected)

        run.metric("mps.share", once)
    seen = ", ".join(f"{each.threads:g} %: {each.multiprocessors}" for each in clients)
    run.result["notes"].append(f"mps.share: multiprocessors given, {seen}")
    run.result["series"]["mps.share"] = [
        [float(percent), round(statistics.median(column), 6)]
        for percent, column in zip(percentages, zip(*rows, strict=True), strict=True)
    ]


def measure_limit(run: Run, count: int, limit_mib: int) -> None:
    """One client asks for more than its limit of memory, and for less, while the others work."""
    with run.clients([min(100 / count, run.most)] * count, limit_mib) as clients:
        *beside, limited = clients
        if not ask(beside[:1], "allocate", mib=limit_mib + 1)[0]["let_in"]:
            run.result["not_run"]["mps.limit"] = (
                f"{limit_mib + 1} MiB can't be had without the limit either, so a refusal would show nothing"
            )
            return
        rounds = run.rounds(beside[0])
        ask(beside, "start", blocks=None, rounds=rounds)
        asked, told = tries(limit_mib), set[str]()

        def once() -> float:
            mib, due = next(asked)
            problem = ""
            try:
                [found] = ask([limited], "allocate", mib=mib)
                if found["let_in"] != due:
                    word = "let in" if found["let_in"] else "refused"
                    problem = f"{mib} MiB {word} at a limit of {limit_mib} MiB"
                run.counted(beside)
            except Over as error:
                problem = f"{mib} MiB asked for at a limit of {limit_mib} MiB, and after that: {error}"
            if problem and not told:
                told.add(problem)
                run.result["notes"].append(f"mps.limit: {problem}")
            return float(bool(problem))

        run.metric("mps.limit", once)
        if not told:
            run.stop(beside)


# A run.


def server_gives(pipe: str) -> float:
    """Percent of the threads that MPS' daemon gives a client at most.

    Raises:
        Over: there is no daemon.
    """
    environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": pipe, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [CONTROL],
            input="get_default_active_thread_percentage\n",
            env=environment,
            capture_output=True,
            text=True,
            timeout=REPLY_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Over(f"no MPS daemon: {error}", "not run") from error
    said = (done.stdout + done.stderr).strip()
    try:
        return float(said)
    except ValueError:
        raise Over(f"no MPS daemon: {CONTROL} says {said[:100]!r}", "not run") from None


def alone(containers: Sequence[str]) -> None:
    """Go on only where nobody uses the card but those containers.

    Raises:
        Over: somebody does.
    """
    end = time.monotonic() + SETTLE_S
    while found := others(containers):
        if time.monotonic() >= end:
            raise Over(in_use(found), "inconclusive")
        time.sleep(0.2)


def measure(arguments: Mapping[str, Any], result: dict[str, Any]) -> None:
    """Fill in the report.

    Raises:
        Over: the run is over; what was measured until then is in the report.
    """
    most = server_gives(arguments["pipe"])
    count, limit_mib = arguments["clients"], arguments.get("limit_mib", LIMIT_MIB)
    percentages = capped(arguments.get("percentages", PERCENTAGES), most)
    asked = "/".join(f"{each:g}" for each in percentages)
    result["setting"] = f"{count} clients; {asked} % of the threads; limit {limit_mib} MiB"
    alone(arguments["containers"])
    run = Run(arguments, most, result)
    measure_gain(run, count)
    measure_fairness(run, count)
    measure_share(run, percentages)
    measure_limit(run, count, limit_mib)
    alone(arguments["containers"])


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def stopped(number: int, _: object) -> NoReturn:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Over(f"stopped by {signal.Signals(number).name}", "inconclusive")


def main(text: str) -> int:
    for number in SIGNALS:
        signal.signal(number, stopped)
    result = report("mps", software="NVIDIA MPS")
    begin = time.monotonic()
    try:
        arguments = json.loads(text)
        nvml_from(arguments["folder"])
        result.update(device("cuda"))
        measure(arguments, result)
        if not result["metrics"]:
            raise Over("; ".join(result["not_run"].values()), "not run")
    except Over as error:
        ruled(result, error.verdict, str(error))
    for name in METRICS:
        if name not in result["metrics"]:
            result["not_run"].setdefault(name, result["reason"])
    result["duration_s"] = round(time.monotonic() - begin, 3)
    print(json.dumps(result), flush=True)
    if result["reason"]:
        say(f"{result['verdict']}: {result['reason']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
