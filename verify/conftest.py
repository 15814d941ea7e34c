# SPDX-License-Identifier: MIT
"""pytest's part of verify: options, hosts, observations, verdicts, exit status, report.

pytest verify --lab inventory/lab.py [--limit gpu01] [-k nvidia.driver] [-m critical]
"""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

import inventory
from inventory import GpulabError, Guest, Lab, Node
from inventory.cards import Card
from verify import waivers
from verify.benchmarks import history
from verify.benchmarks.contract import BadReport, Report
from verify.benchmarks.figures import figures
from verify.benchmarks.measured import Measured, measured
from verify.facts import facts
from verify.observations import READER, Observation, Observations
from verify.promises import promised, title_of
from verify.readers import SUBJECTS, Readers, machine
from verify.report import Run, revision, write
from verify.report.history import Changes
from verify.report.run import printable
from verify.report.summary import lines
from verify.selection import hosts_for, limited, parts_of
from verify.verdicts import INCOMPLETE, Broken, Result, Severity, Undecided, Verdict, exit_status, inconclusive, not_run
from verify.waivers import Waiver

#: Folders in the order in which a reader wants them: from the metal up.
ROOMS = ("hypervisor", "vm", "system", "nvidia", "containers", "benchmarks")
ROOM = Path(__file__).parent
#: What a check may ask for in order to be made once for each of a guest's: see selection.parts_of().
PARTS = ("service", "by_token", "share", "figure", "mps_figure", "pytorch_figure", "ollama_figure", "milvus_figure")


@dataclass(frozen=True)
class Slow:
    """What a read that takes its time is about, and how many seconds of it at each `--benchmarks` that has it."""

    about: str
    takes_s: Mapping[str, int]


#: Subjects that are benchmarks: read where they are asked for, and the terminal says how far they are.
SLOW = {
    "gpubench": Slow("benchmarks", {"quick": 20, "full": 120}),
    "mpsbench": Slow("benchmarks of MPS", {"full": 30}),
    "torchbench": Slow("benchmarks of PyTorch", {"full": 30}),
    "ollamabench": Slow("benchmarks of Ollama", {"full": 30}),
    "milvusbench": Slow("benchmarks of Milvus", {"full": 30}),
}
#: Seconds after which the terminal is told what is new.
PROGRESS_S = 0.2

LAB = pytest.StashKey[Lab]()
CHOSEN = pytest.StashKey[Collection[str]]()
READERS = pytest.StashKey[Readers]()
OBSERVATIONS = pytest.StashKey[Observations]()
RESULTS = pytest.StashKey[dict[str, Result]]()
SEEN = pytest.StashKey[str]()
#: Seconds that a check has waited for what it reads.
WAITED = pytest.StashKey[float]()
BEGAN = pytest.StashKey[float]()
REVISION = pytest.StashKey[str]()
RUN = pytest.StashKey[tuple[Run, Changes | None]]()
WAIVERS = pytest.StashKey[list[Waiver]]()
#: Every check of the lab by host and id, whatever this run chose of them.
CHECKS = pytest.StashKey[dict[tuple[str, str], Severity]]()
#: Items that are made only when they are asked for, and were not.
LEFT_OUT = pytest.StashKey[list[pytest.Item]]()
PROMISED = pytest.StashKey[str]()
#: Lines about long reads, from the threads that read, to be printed.
PROGRESS = pytest.StashKey["queue.SimpleQueue[str]"]()
#: The benchmarks by guest and subject, with the observation that they were made of.
MEASURED = pytest.StashKey[dict[tuple[str, str], tuple[Observation, Measured]]]()
#: What is wrong with the histories of benchmarks, a line each.
UNKEPT = pytest.StashKey[list[str]]()
#: Set once everything that may be refused was not.
READY = pytest.StashKey[bool]()
#: Where a report carries its verdict to pytest_report_teststatus().
VERDICT = "gpulab_verdict"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpulab")
    group.addoption("--lab", metavar="FILE", help="the inventory whose promises are checked (required)")
    group.addoption("--limit", metavar="HOST", action="append", default=[], help="only this host or group; repeatable")
    group.addoption("--data", metavar="KEY=VALUE", action="append", default=[], help="as pyinfra's --data; repeatable")
    group.addoption(
        "--disruptive", action="store_true", help="also run the checks that interrupt services, such as a restart"
    )
    group.addoption(
        "--benchmarks",
        choices=("off", "quick", "full"),
        default="off",
        help="how much of the benchmarks: none (default), the card in under 20 s, or card and services in minutes, as "
        "after a rebuild",
    )
    group.addoption(
        "--quick", action="store_const", const="quick", dest="benchmarks", help="the same as --benchmarks quick"
    )
    group.addoption(
        "--drain", action="store_true", help="stop a guest's services for its benchmarks, should the GPU be in use"
    )
    group.addoption("--report", metavar="DIR", help="where the report goes (default: reports/<name of the lab>)")
    group.addoption(
        "--waivers", metavar="FILE", help="accepted failures (default: <name of the lab>.waivers.toml beside it)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "on(kind): the hosts a check is for, see selection.hosts_for()")
    config.addinivalue_line("markers", "disruptive: interrupts services; only with --disruptive")
    if config.option.help or getattr(config.option, "markers", False):
        return
    file = config.getoption("--lab")
    if file is None:
        raise pytest.UsageError("verify needs an inventory\nhint: pytest verify --lab inventory/lab.py")
    try:
        lab = inventory.load(file, config.getoption("--data"))
        chosen = limited(lab, config.getoption("--limit"))
        path = waivers_file(config)
        config.stash[WAIVERS] = waivers.load(path) if config.getoption("--waivers") or path.exists() else []
    except (GpulabError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[LAB], config.stash[CHOSEN] = lab, chosen
    config.stash[RESULTS], config.stash[CHECKS], config.stash[MEASURED] = {}, {}, {}
    config.stash[PROGRESS] = queue.SimpleQueue()
    config.stash[BEGAN], config.stash[REVISION] = time.time(), revision(config.rootpath)
    # Our own summary says it better: without tracebacks and with what would heal each failure.
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "no"
    if config.option.reportchars == "fE":
        config.option.reportchars = ""


def pytest_unconfigure(config: pytest.Config) -> None:
    if OBSERVATIONS in config.stash:
        config.stash[OBSERVATIONS].close()
    if READERS in config.stash:
        config.stash[READERS].close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    mark = metafunc.definition.get_closest_marker("on")
    if mark is not None:
        note_checks(metafunc, mark.args[0])
        names = hosts_for(metafunc.config.stash[LAB], mark.args[0], metafunc.config.stash[CHOSEN])
        parts = [name for name in PARTS if name in metafunc.fixturenames]
        if not parts:
            metafunc.parametrize("machine_name", names, ids=names, scope="session")
            return
        lab, part = metafunc.config.stash[LAB], parts[0]
        pairs = [(name, each) for name in names for each in parts_of(lab, name, part)]
        ids = [f"{name}-{each}" for name, each in pairs]
        metafunc.parametrize(("machine_name", part), pairs, ids=ids, scope="session")


def note_checks(metafunc: pytest.Metafunc, kind: str) -> None:
    """Remember the check for every host of the lab, chosen or not: a waiver may be about any of them."""
    lab, mark, level = metafunc.config.stash[LAB], promise(metafunc.definition), severity(metafunc.definition)
    if mark is None or level is None:
        return
    part = next((name for name in PARTS if name in metafunc.fixturenames), None)
    for host in hosts_for(lab, kind, limited(lab, [])):
        for about in [{part: each} for each in parts_of(lab, host, part)] if part else [{}]:
            metafunc.config.stash[CHECKS][host, mark.args[0].format(**about)] = level


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A check of a kind that no chosen host is of would be a skip of pytest's own.
    items[:] = [item for item in items if host_of(item) is not None or "machine_name" not in fixtures_of(item)]
    unasked = [item for item in items if not is_asked_for(item)]
    config.stash[LEFT_OUT] = unasked
    items[:] = [item for item in items if item not in unasked]
    config.hook.pytest_deselected(items=unasked)
    for item in items:
        if host_of(item) is None or promise(item) is None or severity(item) is None:
            raise pytest.UsageError(f"{item.nodeid}: a check needs @on, @promise and one severity")
        item.stash[PROMISED] = promise_of(item)
    if is_whole(config):
        hosts, accepted, checks = limited(config.stash[LAB], []), config.stash[WAIVERS], config.stash[CHECKS]
        try:
            waivers.check(waivers_file(config), accepted, hosts, checks)
        except waivers.WaiverError as error:
            raise pytest.UsageError(str(error)) from None
    config.stash[READY] = True
    items.sort(key=lambda item: (ROOMS.index(subject_of(item)), item.path.name))


def is_asked_for(item: pytest.Item) -> bool:
    """Is it a check that is always made, or do the options ask for it?"""
    if item.get_closest_marker("disruptive") and not item.config.getoption("--disruptive"):
        return False
    effort = item.config.getoption("--benchmarks")
    return all(effort in SLOW[name].takes_s for name in fixtures_of(item) if name in SLOW)


def pytest_itemcollected(item: pytest.Item) -> None:
    """`-k nvidia.driver` chooses by id."""
    if promise(item) is not None:
        item.extra_keyword_matches.add(check_id(item))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to read, for all hosts at once, what the chosen checks will ask for."""
    config = session.config
    # pytest comes here after a usage error, too.
    if config.option.collectonly or READY not in config.stash:
        return
    lane_of: Callable[[str, str], str] = lambda host, subject: host  # noqa: E731
    if READER not in config.stash:
        effort, drain, progress = config.getoption("--benchmarks"), config.getoption("--drain"), config.stash[PROGRESS]
        tell: Callable[[str, str], None] = lambda host, line: progress.put(f"{host}: {line}")  # noqa: E731
        config.stash[READERS] = readers = Readers(config.stash[LAB], effort, drain, tell)
        config.stash[READER], lane_of = readers.read, readers.lane
    wanted = {(host_of(item) or "", name) for item in session.items for name in fixtures_of(item) if name in SUBJECTS}
    config.stash[OBSERVATIONS] = Observations(config.stash[READER], lane_of)
    config.stash[OBSERVATIONS].start(sorted(wanted, key=lambda pair: SUBJECTS.index(pair[1])))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "setup":
        # Where it waited for what it reads.
        item.stash[WAITED] = report.duration
    if report.when == "call" or report.failed or report.skipped:
        # A check that broke in its teardown has a verdict already; a broken one takes it back.
        result = judge(item, call, report)
        item.config.stash[RESULTS][item.nodeid] = result
        setattr(report, VERDICT, result.verdict)
        if result.verdict is Verdict.WAIVED:
            # To pytest it is a skip: no failure for -x to stop at.
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"waived: {result.waiver}")
    return report


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """`?` and `-` in place of pytest's skips."""
    match getattr(report, VERDICT, None):
        case Verdict.INCONCLUSIVE:
            return "inconclusive", "?", "INCONCLUSIVE"
        case Verdict.NOT_RUN:
            return "not run", "-", "NOT RUN"
        case Verdict.WAIVED:
            return "waived", "w", "WAIVED"
    return None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if OBSERVATIONS not in config.stash or config.option.collectonly:
        return
    for item in session.items:
        if item.nodeid not in config.stash[RESULTS]:
            config.stash[RESULTS][item.nodeid] = outcome(item, Verdict.NOT_RUN, "the run was stopped before it")
    today, accepted = date.today(), config.stash[WAIVERS]
    results = list(config.stash[RESULTS].values())
    results += waivers.expired(accepted, results, waivers_file(config), today)
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = exit_status(results)
    elif exitstatus == pytest.ExitCode.INTERRUPTED:
        session.exitstatus = INCOMPLETE
    lab, file = config.stash[LAB], Path(config.getoption("--lab"))
    benchmarks = all_measured(config)
    config.stash[UNKEPT] = keep(lab, benchmarks)
    run = Run(
        lab=file.stem,
        file=str(file),
        began=config.stash[BEGAN],
        duration_s=time.time() - config.stash[BEGAN],
        revision=config.stash[REVISION],
        limits=tuple(config.getoption("--limit")),
        selection=selection(config),
        left_out=[(host_of(item) or "", check_id(item)) for item in config.stash[LEFT_OUT]],
        facts=facts(config.stash[OBSERVATIONS].known()),
        reads=config.stash[OBSERVATIONS].seconds(),
        needless=[f"{each.id} on {each.host}: {each}" for each in waivers.needless(accepted, results, today)],
        figures=[figure for (name, _), each in benchmarks.items() for figure in figures(name, each)],
        simulated=sorted({machine(lab, name).simulated for name in config.stash[CHOSEN]} - {""}),
        unexcused=unexcused(lab, config.stash[CHOSEN]),
        exit_status=int(session.exitstatus),
        results=results,
    )
    folder = Path(config.getoption("--report") or config.invocation_params.dir / "reports" / file.stem)
    config.stash[RUN] = write(run, folder, [machine(lab, name).state for name in (*lab.nodes, *lab.guests)])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if RUN in config.stash:
        terminalreporter.write_line("")
        for line in (*config.stash[UNKEPT], *lines(*config.stash[RUN])):
            terminalreporter.write_line(line)


def judge(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> Result:
    """The verdict of a check that has ended, in words for its reader."""
    error = call.excinfo.value if call.excinfo is not None else None
    duration_s = report.duration + (item.stash.get(WAITED, 0.0) if report.when == "call" else 0.0)
    match error:
        case None:
            return outcome(item, Verdict.PASS, item.stash.get(SEEN, ""), duration_s=duration_s)
        case Undecided():
            return if_waived(item, outcome(item, error.verdict, str(error), duration_s=duration_s))
        case pytest.skip.Exception():
            return outcome(item, Verdict.NOT_RUN, str(error), duration_s=duration_s)
        case AssertionError():
            fix = error.fix if isinstance(error, Broken) else None
            # pytest adds how the compared values came about; the message of the check says what they mean.
            message = str(error).partition("\nassert ")[0]
            return if_waived(item, outcome(item, Verdict.FAIL, message, fix, duration_s))
    return outcome(
        item,
        Verdict.FAIL,
        f"the check itself broke: {type(error).__name__}: {error}",
        "run it again with --tb=long, and report it",
        duration_s,
    )


def if_waived(item: pytest.Item, result: Result) -> Result:
    """The result, waived where a waiver covers it. A check that broke has told nothing that could be."""
    accepted = item.config.stash[WAIVERS]
    return waivers.waived(result, accepted, date.today())


def outcome(
    item: pytest.Item, verdict: Verdict, message: str, fix: str | None = None, duration_s: float = 0.0
) -> Result:
    """A result of `item`; `fix` defaults to that of its promise."""
    lab, name = item.config.stash[LAB], host_of(item) or ""
    host, mark, level = machine(lab, name), promise(item), severity(item)
    assert mark is not None and level is not None  # pytest_collection_modifyitems refused all others
    places = {"lab": item.config.getoption("--lab"), "host": name, "node": getattr(host, "node", name), **part_of(item)}
    patterns = host.expected_not_run if isinstance(host, Guest) and host.simulated else []
    expected = any(fnmatchcase(check_id(item), pattern) for pattern in patterns)
    observed = [value.simulated for value in getattr(item, "funcargs", {}).values() if isinstance(value, Observation)]
    return Result(
        id=check_id(item),
        host=name,
        subject=subject_of(item),
        severity=level,
        verdict=verdict,
        message=message,
        fix=(mark.kwargs["fix"] if fix is None else fix).format(**places) if verdict is Verdict.FAIL else "",
        duration_s=duration_s,
        title=title_of(getattr(item, "originalname", item.name), part_of(item)),
        promise=item.stash[PROMISED],
        simulated=host.simulated or ", ".join(filter(None, observed)),
        expected=expected and verdict is Verdict.NOT_RUN,
    )


def waivers_file(config: pytest.Config) -> Path:
    return Path(config.getoption("--waivers") or waivers.beside(Path(config.getoption("--lab"))))


def is_whole(config: pytest.Config) -> bool:
    """Is all of verify collected, be it to choose from?"""
    return any(Path(config.invocation_params.dir, word.partition("::")[0]).resolve() == ROOM for word in config.args)


def selection(config: pytest.Config) -> str:
    """The options that leave checks out; empty when all of verify is to run."""
    words = [f"--limit {word}" for word in config.getoption("--limit")]
    words += [f"-k '{config.option.keyword}'"] if config.option.keyword else []
    # pyproject.toml has a -m for the tests of gpulab, which leaves out no check.
    if config.option.markexpr and config.option.markexpr not in config.getini("addopts"):
        words.append(f"-m '{config.option.markexpr}'")
    words += [f"--deselect {word}" for word in config.option.deselect or []]
    if not is_whole(config):
        words += [os.path.relpath(word, config.invocation_params.dir) for word in config.args]
    return " ".join(words)


def promise_of(item: pytest.Item) -> str:
    """The inventory's values that the check is about."""
    lab, name, mark = item.config.stash[LAB], host_of(item) or "", promise(item)
    assert mark is not None
    try:
        return promised(lab, machine(lab, name), mark.args[1:], part_of(item))
    except (AttributeError, KeyError, StopIteration) as error:
        raise pytest.UsageError(f"{item.nodeid}: a key of @promise names nothing: {error}") from None


def unexcused(lab: Lab, chosen: Collection[str]) -> list[str]:
    """Guests of real hardware that expect checks not to run: nothing is excused there."""
    guests = [lab.guests[name] for name in chosen if name in lab.guests]
    return [guest.name for guest in guests if guest.expected_not_run and not guest.simulated]


def host_of(item: pytest.Item) -> str | None:
    """The host that a check is about; None: it was collected for none."""
    call = getattr(item, "callspec", None)
    name = call.params.get("machine_name") if call is not None else None
    return name if isinstance(name, str) else None


def fixtures_of(item: pytest.Item) -> list[str]:
    return list(getattr(item, "fixturenames", []))


def part_of(item: pytest.Item) -> dict[str, str]:
    """The part of its host that the check is about; empty: the host itself."""
    call = getattr(item, "callspec", None)
    return {name: call.params[name] for name in PARTS if name in call.params} if call is not None else {}


def promise(item: pytest.Item) -> pytest.Mark | None:
    """The check's id, the inventory's keys that it is about (see promises.promised()), and `fix`: what would heal it.
    All may name its part, as `{service}`.
    """
    return item.get_closest_marker("promise")


def check_id(item: pytest.Item) -> str:
    mark = promise(item)
    return mark.args[0].format(**part_of(item)) if mark is not None else ""


def severity(item: pytest.Item) -> Severity | None:
    """The check's severity, None unless it has exactly one."""
    found = [level for level in Severity if item.get_closest_marker(level.value)]
    return found[0] if len(found) == 1 else None


def subject_of(item: pytest.Item) -> str:
    """The folder that the check lies in."""
    return item.path.relative_to(ROOM).parts[0]


@pytest.fixture(scope="session")
def lab(pytestconfig: pytest.Config) -> Lab:
    return pytestconfig.stash[LAB]


@pytest.fixture
def node(lab: Lab, machine_name: str) -> Node:
    """The node that the check is about, or that its guest runs on."""
    return lab.nodes[machine_name] if machine_name in lab.nodes else lab.node_of(lab.guests[machine_name])


@pytest.fixture
def guest(lab: Lab, machine_name: str) -> Guest:
    return lab.guests[machine_name]


@pytest.fixture
def card(lab: Lab, guest: Guest) -> Card:
    """What the card table knows of the guest's GPU."""
    card = lab.card_of(guest)
    assert card is not None
    return card


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Says what a check that passes has seen; the report shows it."""

    def say(text: str) -> None:
        request.node.stash[SEEN] = text

    return say


@pytest.fixture
def guest_sees_gpu(guest: Guest, nvidia: Observation) -> None:
    """What the guest itself does not see, its containers can't: one check says so, nvidia.gpu.visible."""
    if guest.gpu is not None and not nvidia["nvml"]["gpus"]:
        not_run("the guest itself sees no GPU")


@pytest.fixture
def pci_tree(pytestconfig: pytest.Config, node: Node) -> Callable[[], Observation]:
    """Reads the node's PCI tree, for a check of its guest that cannot do without."""
    return lambda: pytestconfig.stash[OBSERVATIONS].get(node.name, "hypervisor")


def measured_of(config: pytest.Config, guest: Guest, subject: str, observation: Observation) -> Measured:
    """What is made of that observation, once.

    Raises:
        BadReport: it is no report of a benchmark.
    """
    known, key = config.stash[MEASURED], (guest.name, subject)
    if key not in known or known[key][0] is not observation:
        path = history.file_of(config.stash[LAB], guest)
        bare = None if subject == "gpubench" else bare_of(config, guest)
        known[key] = observation, measured(observation, path, config.stash[REVISION], guest.simulated, bare)
    return known[key][1]


def bare_of(config: pytest.Config, guest: Guest) -> Report | None:
    """What gpubench measured in this run, if it did."""
    observation = config.stash[OBSERVATIONS].known().get((guest.name, "gpubench"))
    if observation is None:
        return None
    try:
        return measured_of(config, guest, "gpubench", observation).report
    except BadReport:
        return None


def all_measured(config: pytest.Config) -> dict[tuple[str, str], Measured]:
    """The benchmarks that this run made, by guest and subject; also those that no check came to look at."""
    found = {}
    for (host, subject), observation in config.stash[OBSERVATIONS].known().items():
        if subject in SLOW:
            with contextlib.suppress(BadReport):
                found[host, subject] = measured_of(config, config.stash[LAB].guests[host], subject, observation)
    return dict(sorted(found.items(), key=lambda each: SUBJECTS.index(each[0][1])))


def keep(lab: Lab, benchmarks: Mapping[tuple[str, str], Measured]) -> list[str]:
    """Add each run to its guest's history; lines about those that can't be read or written."""
    notes: list[str] = []
    for (name, _), each in benchmarks.items():
        path = history.file_of(lab, lab.guests[name])
        notes += [note for note in each.runs.notes if note not in notes]
        try:
            each.keep(path)
        except OSError as error:
            notes.append(f"{path}: {error.strerror or error}: these benchmarks are not kept")
    return notes


def say_now(config: pytest.Config, line: str) -> None:
    """Print a line of its own amid the verdicts."""
    reporter, capture = (config.pluginmanager.get_plugin(name) for name in ("terminalreporter", "capturemanager"))
    if reporter is None:
        return
    with capture.global_and_fixture_disabled() if capture is not None else contextlib.nullcontext():
        reporter.ensure_newline()
        reporter.write_line(line)
        reporter.flush()


def wait_for(config: pytest.Config, host: str, subject: str) -> None:
    """Wait for a long read; print meanwhile how far it is, and those of other hosts."""
    observations, progress = config.stash[OBSERVATIONS], config.stash[PROGRESS]
    if observations.awaits(host, subject):
        effort, slow = config.getoption("--benchmarks"), SLOW[subject]
        say_now(config, f"{host}: {slow.about}, {effort}, about {slow.takes_s[effort]} s")
    waiting = True
    while waiting:
        waiting = observations.awaits(host, subject, PROGRESS_S)
        # What a host prints may hold control characters, which a terminal obeys.
        with contextlib.suppress(queue.Empty):
            while True:
                say_now(config, printable(progress.get_nowait()))


def observation(subject: str) -> Callable[..., Observation]:
    """The fixture of a subject: what was read of the host, once a session."""

    def read(pytestconfig: pytest.Config, machine_name: str) -> Observation:
        if subject in SLOW:
            wait_for(pytestconfig, machine_name, subject)
        return pytestconfig.stash[OBSERVATIONS].get(machine_name, subject)

    return pytest.fixture(name=subject)(read)


reach = observation("reach")
hypervisor = observation("hypervisor")
system = observation("system")
nvidia = observation("nvidia")
containers = observation("containers")
milvus = observation("milvus")
pytorch = observation("pytorch")
ollama_load = observation("ollama_load")
ports = observation("ports")
access = observation("access")
daemon_reload = observation("daemon_reload")
engine_restart = observation("engine_restart")
api = observation("api")
vm = observation("vm")
process = observation("process")
backup = observation("backup")
gpubench = observation("gpubench")
mpsbench = observation("mpsbench")
torchbench = observation("torchbench")
ollamabench = observation("ollamabench")
milvusbench = observation("milvusbench")


def judged(config: pytest.Config, guest: Guest, subject: str, found: Observation) -> Measured:
    """What the figures of a benchmark mean; without a report of it no check can tell."""
    try:
        return measured_of(config, guest, subject, found)
    except BadReport as error:
        inconclusive(f"{subject} printed what is no report of it: {error}")


@pytest.fixture
def benchmarks(pytestconfig: pytest.Config, guest: Guest, gpubench: Observation) -> Measured:
    """The card alone, tier 0."""
    return judged(pytestconfig, guest, "gpubench", gpubench)


@pytest.fixture
def mps_benchmark(pytestconfig: pytest.Config, guest: Guest, mpsbench: Observation) -> Measured:
    return judged(pytestconfig, guest, "mpsbench", mpsbench)


@pytest.fixture
def pytorch_benchmark(pytestconfig: pytest.Config, guest: Guest, torchbench: Observation) -> Measured:
    return judged(pytestconfig, guest, "torchbench", torchbench)


@pytest.fixture
def ollama_benchmark(pytestconfig: pytest.Config, guest: Guest, ollamabench: Observation) -> Measured:
    return judged(pytestconfig, guest, "ollamabench", ollamabench)


@pytest.fixture
def milvus_benchmark(pytestconfig: pytest.Config, guest: Guest, milvusbench: Observation) -> Measured:
    return judged(pytestconfig, guest, "milvusbench", milvusbench)
