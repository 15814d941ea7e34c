# SPDX-License-Identifier: MIT
"""Tier 1 for Milvus before the real server: what is measured, what is found wrong, and that nothing of it stays."""

from __future__ import annotations

import ast
import collections
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from inventory.services import Milvus
from operations.containers.milvus import service
from rehearsal.registry.milvus import recipe
from tests.rehearsal.milvus_server import network, serving
from tests.rehearsal.test_milvus_deploy import milvus
from verify.benchmarks import contract, milvusbench, ollamabench
from verify.benchmarks.references import NOISE
from verify.containers import indexes
from verify.hosts import whole

REPOSITORY = Path(__file__).parents[2]
#: Root's password on a server that nobody has set up.
PASSWORD = "Milvus"
HNSW = {"index_type": "HNSW", "metric_type": "L2", "M": "8", "efConstruction": "32"}
ORDER: dict[str, Any] = {
    "port": 19530,
    "metrics_port": 9091,
    "index": HNSW,
    "search": {"ef": 64},
    "dimension": 16,
    "containers": [],
    "limit_s": 25,
}
#: Runs the program with little effort, and with whatever is to be wrong.
TINY = """
import sys
from verify.benchmarks import milvusbench as bench
bench.SIZES = {kind: bench.Sizes(2048, 0.0, {1: 20, 8: 5}) for kind in ("cpu", "cuda")}
CHANGE
bench.main()
"""
#: Few samples, where the builds are not what is looked at: the server begins one a second.
QUICK = "bench.LEAST = 1\n"
DATABASES = """
import sys
from verify.benchmarks import milvusbench as bench
import time
client = bench.Client(19530, sys.argv[1], time.monotonic() + 60)
print(*client.ask(client.api.ListDatabasesRequest(), "").db_names)
"""

real = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a network namespace")
Lab = Callable[..., subprocess.Popen[str]]


#: A run of its own takes ten seconds.
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Starts Python in the network of a server that has the settings of the service."""
    folder = tmp_path_factory.mktemp("milvus")
    settings = json.dumps(service.settings(milvus(), "storage-secret")).replace(service.DATA, str(folder / "data"))
    with (
        network(f"gpulab-bench-{os.getpid()}") as loopback,
        serving(recipe.NOW, folder, loopback, json.loads(settings)),
    ):

        def start(script: str, *arguments: str, isolated: bool = False) -> subprocess.Popen[str]:
            return subprocess.Popen(
                [*loopback, sys.executable, *(["-I"] if isolated else []), "-c", script, *arguments],
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

        yield start


def databases(lab: Lab) -> list[str]:
    told, error = lab(DATABASES, PASSWORD).communicate(timeout=60)
    assert told, error
    return told.split()


def finished(process: subprocess.Popen[str], password: str | None = PASSWORD) -> contract.Report:
    told, error = process.communicate(json.dumps({"root": password}), timeout=120)
    assert process.returncode == 0, error
    return contract.read(told)


def run(lab: Lab, change: str = "", password: str | None = PASSWORD, **changed: Any) -> contract.Report:
    return finished(lab(TINY.replace("CHANGE", change), json.dumps({**ORDER, **changed})), password)


@real
@pytest.mark.parametrize("metric", ["L2", SLOW("IP"), SLOW("COSINE")])
def test_everything_is_measured_and_nothing_stays(lab: Lab, metric: str) -> None:
    found = run(lab, QUICK, index=HNSW | {"metric_type": metric})

    assert (found.verdict, found.reason, found.device, found.not_run) == ("measured", "", "cpu", {})
    assert found.software.startswith("milvus v2.3.5")
    assert found.setting.startswith(f"HNSW M 8 efConstruction 32 ef 64, {metric}, dimension 16, 2048 vectors in 20 ")
    assert found.setting.endswith(", builds timed by Milvus")
    assert found.metrics.keys() == contract.TOOLS["milvus"].keys()
    for figures in found.metrics.values():
        assert (figures.checked, figures.wrong) == (True, 0)
    # A graph of 2048 vectors in which 64 candidates are kept loses next to nothing.
    assert 0.9 < min(found.metrics["milvus.recall"].samples) <= max(found.metrics["milvus.recall"].samples) <= 1
    assert databases(lab) == ["default"]


@real
def test_program_runs_as_one_text(lab: Lab) -> None:
    """As on a guest, where nothing of gpulab is installed; its sizes are the real ones."""
    found = finished(lab(whole(Path(milvusbench.__file__)), json.dumps(ORDER | {"dimension": 8}), isolated=True))

    assert (found.verdict, found.reason) == ("measured", "")
    assert "4000 vectors" in found.setting and "1 x 100 and 8 x 25 a sample" in found.setting
    assert found.metrics.keys() == contract.TOOLS["milvus"].keys()
    for figures in found.metrics.values():
        assert len(figures.samples) >= milvusbench.LEAST and (figures.checked, figures.wrong) == (True, 0)


@real
@pytest.mark.slow
def test_server_that_does_not_time_its_builds_is_timed_from_outside(lab: Lab) -> None:
    found = run(lab, QUICK, metrics_port=None)

    assert found.verdict == "measured"
    assert found.setting.endswith(", builds timed by its client, in steps of Milvus' scheduler")


@real
def test_index_that_the_server_does_not_know_is_not_run(lab: Lab) -> None:
    cagra = {"index_type": "GPU_CAGRA", "metric_type": "L2", "graph_degree": "32", "intermediate_graph_degree": "64"}

    found = run(lab, index=cagra, search={"itopk_size": 128})

    assert (found.verdict, found.device) == ("not run", "cuda")
    assert found.reason.startswith("Milvus refuses the index: ") and "invalid index type: GPU_CAGRA" in found.reason
    assert found.not_run.keys() == contract.TOOLS["milvus"].keys() and not found.metrics
    assert databases(lab) == ["default"]


@real
def test_index_of_the_gpu_without_a_card_is_not_run(lab: Lab) -> None:
    """As of a server that takes the name, and builds something."""
    change = 'bench.device = lambda kind: {"device": "cuda", "card": None, "driver": None, "processor": ""}'

    found = run(lab, change)

    assert (found.verdict, found.reason) == ("not run", "the index is one of the GPU, and NVML knows no card")


#: What is changed in the program, the metric that it is seen in, and the words.
WRONG = {
    "rows are lost": (
        "insert = bench.Bench.insert\n"
        "bench.INSERT_BYTES = 4 * 16 * 1024\n"
        "bench.Bench.indexed = lambda self: True\n"
        "bench.Bench.insert = lambda self, begin, some: insert(self, begin, some if begin else some[:-24])",
        {"milvus.build"},
        "Milvus has 2024 rows of 2048",
    ),
    "ids that nobody inserted": (
        "insert = bench.Bench.insert\nbench.Bench.insert = lambda self, begin, some: insert(self, begin + 5000, some)",
        {"milvus.recall", "milvus.qps.1", "milvus.qps.8"},
        "which nobody inserted",
    ),
    "ids of other vectors": (
        "insert = bench.Bench.insert\nbench.Bench.insert = lambda self, begin, some: insert(self, begin, some[::-1])",
        {"milvus.recall", "milvus.qps.1", "milvus.qps.8"},
        " at distance ",
    ),
    "distances by another measure": (
        "bench.Data.between = (lambda own: lambda self, query, ids: own(self, query, ids) ** 0.5)(bench.Data.between)",
        {"milvus.recall", "milvus.qps.1", "milvus.qps.8"},
        " at distance ",
    ),
    "too few neighbours": (
        "request = bench.Bench.request\n"
        "def fewer(self, queries):\n"
        "    self.top_k -= 1\n"
        "    try:\n"
        "        return request(self, queries)\n"
        "    finally:\n"
        "        self.top_k += 1\n"
        "bench.Bench.request = fewer",
        {"milvus.recall", "milvus.qps.1", "milvus.qps.8"},
        "a search found 9 vectors where 10 are asked for",
    ),
}


@real
@pytest.mark.parametrize("what", [SLOW(what) if number else what for number, what in enumerate(WRONG)])
def test_answers_that_cannot_be_right_are_wrong(lab: Lab, what: str) -> None:
    change, metrics, words = WRONG[what]

    found = run(lab, QUICK + change)

    assert found.verdict == "failed" and words in found.reason
    assert {name for name, figures in found.metrics.items() if figures.wrong} == metrics
    assert databases(lab) == ["default"]


@real
def test_index_that_finds_the_wrong_neighbours_loses_recall(lab: Lab) -> None:
    found = run(lab, QUICK + "bench.TOP_K = 1", index=HNSW | {"M": "2", "efConstruction": "8"}, search={"ef": 1})

    assert found.verdict == "measured"
    assert max(found.metrics["milvus.recall"].samples) < 0.9


@real
@pytest.mark.parametrize("how", [signal.SIGKILL, SLOW(signal.SIGTERM), SLOW(signal.SIGHUP)])
def test_killed_run_leaves_nothing_after_the_next(lab: Lab, how: signal.Signals) -> None:
    process = lab(TINY.replace("CHANGE", ""), json.dumps(ORDER))
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(json.dumps({"root": PASSWORD}))
    process.stdin.close()
    while "filled" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(how)
    assert process.stdout is not None
    told = process.stdout.read()
    process.wait(timeout=60)

    if how == signal.SIGKILL:
        assert sorted(databases(lab)) == ["default", "gpulab_bench"]
        assert run(lab, QUICK).verdict == "measured"
    else:
        found = contract.read(told)
        assert (found.verdict, found.reason) == ("inconclusive", f"ended by {how.name}")
    assert databases(lab) == ["default"]


@real
@pytest.mark.slow
def test_time_that_is_up_is_told_and_nothing_stays(lab: Lab) -> None:
    found = run(lab, "bench.AROUND_S = bench.CLEAN_S + 6", limit_s=0.1)

    assert found.verdict == "failed" and found.reason.startswith("DEADLINE_EXCEEDED: the time is up before ")
    assert databases(lab) == ["default"]


@real
@pytest.mark.parametrize(
    ("password", "words"),
    [("wrong-password", "Milvus refuses root's login: "), (None, "the lab has no password of root")],
)
def test_login_that_is_refused_is_not_run(lab: Lab, password: str | None, words: str) -> None:
    found = run(lab, password=password)

    assert found.verdict == "not run" and found.reason.startswith(words)
    assert "wrong-password" not in json.dumps(found.model_dump())


@real
def test_server_that_is_away_is_not_run(lab: Lab) -> None:
    found = run(lab, port=19999)

    assert found.verdict == "not run" and found.reason.startswith("Milvus does not answer: ")


@real
def test_card_in_use_by_others_is_left_to_them(lab: Lab) -> None:
    card = {"device": "cuda", "card": {"name": "A", "pci_id": "10de:24b0", "uuid": "GPU-1"}, "driver": "580.95"}
    change = (
        f"bench.device = lambda kind: {card | {'processor': ''}}\nbench.others = lambda containers: ['PID 7 python']"
    )
    cagra = {"index_type": "GPU_CAGRA", "metric_type": "L2"}

    found = run(lab, change, index=cagra)

    assert (found.verdict, found.reason) == ("inconclusive", "GPU in use by PID 7 python")
    assert databases(lab) == ["default"]


@pytest.mark.parametrize("metric", ["L2", "IP", "COSINE"])
def test_nearest_are_those_of_a_plain_comparison(metric: str) -> None:
    data = milvusbench.Data(500, 12, metric, 3)
    queries = data.drawn(7)

    found = data.nearest(queries, 10)

    for query, ids in zip(queries.astype(float), found, strict=True):
        vectors = data.vectors.astype(float)
        far = ((vectors - query) ** 2).sum(axis=1) if metric == "L2" else -(vectors @ query)
        assert ids == set(numpy.argsort(far)[:10].tolist())


def test_vectors_lie_in_clusters_and_are_the_same_each_time() -> None:
    data, again, other = (milvusbench.Data(1000, 32, "L2", seed) for seed in (1, 1, 2))

    assert (data.vectors == again.vectors).all() and not (data.vectors == other.vectors).any()
    query = data.drawn(1)[0]
    far = numpy.sort(((data.vectors - query) ** 2).sum(axis=1))
    # Those of its own cluster, and all others.
    assert far[10] < far[500] / 3
    assert numpy.allclose(numpy.linalg.norm(milvusbench.Data(1000, 32, "IP", 1).vectors, axis=1), 1)


@pytest.mark.parametrize(
    ("kind", "dimension", "rows"),
    [("cpu", 128, 4000), ("cpu", 32768, 2048), ("cuda", 128, 100_000), ("cuda", 768, 21845), ("cuda", 32768, 2048)],
)
def test_vectors_are_one_segment_that_milvus_indexes(kind: str, dimension: int, rows: int) -> None:
    assert milvusbench.rows_of(kind, dimension) == rows


def test_builds_are_read_of_milvus_own_metrics() -> None:
    name = "milvus_indexnode_knowhere_build_index_latency"
    lines = [
        f"# HELP {name} latency of building the index by knowhere",
        f'{name}_bucket{{node_id="1",le="5"}} 19',
        f'{name}_sum{{node_id="1"}} 13.18',
        f'{name}_count{{node_id="1"}} 19',
        f'{name}_sum{{node_id="2"}} 2',
        f'{name}_count{{node_id="2"}} 1',
        "knowhere_build_latency_count 19",
    ]

    found = milvusbench.built_of(lines)
    assert found is not None and found == pytest.approx((20, 15.18))
    assert milvusbench.built_of([]) == (0, 0)
    assert milvusbench.builds(None) is None


def test_threads_begin_together_and_what_breaks_in_one_is_told() -> None:
    answers, seconds = milvusbench.at_once([lambda: 1, lambda: 2])
    assert answers == [1, 2] and seconds > 0

    def breaks() -> None:
        raise milvusbench.NoAnswer("UNAVAILABLE", "gone")

    with pytest.raises(milvusbench.NoAnswer, match="gone"):
        milvusbench.at_once([lambda: 1, breaks])


def test_declared_index_is_what_is_measured() -> None:
    declared: Milvus = milvus()

    assert indexes.to_be_measured(declared) == {"dimension": 2, "index": indexes.built(declared.indexes["sky"]),
                                                "search": {"ef": 128}}  # fmt: skip


@pytest.mark.parametrize("program", [milvusbench, ollamabench])
def test_samples_are_taken_until_the_noise_that_is_declared(program: Any) -> None:
    tool: contract.Tool = "milvus" if program is milvusbench else "ollama"

    assert {name: NOISE[name] for name in contract.TOOLS[tool]} == program.NOISE


@pytest.mark.parametrize("program", [milvusbench, ollamabench])
def test_no_name_of_a_program_hides_one_of_what_goes_in_front_of_it(program: Any) -> None:
    """They are one text on the guest."""
    names: collections.Counter[str] = collections.Counter()
    for node in ast.parse(whole(Path(program.__file__))).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] += 1
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                names.update(each.id for each in ast.walk(target) if isinstance(each, ast.Name))

    assert [name for name, count in names.items() if count > 1] == []
