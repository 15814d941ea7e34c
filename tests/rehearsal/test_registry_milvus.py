# SPDX-License-Identifier: MIT
"""The real Milvus server of `lab/milvus`, unpacked: settings, first process, and one collection over pymilvus."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rehearsal.registry.milvus import entry, recipe
from tests.rehearsal.milvus_server import Serve, network, serving

TEMPLATE = """\
etcd:
  endpoints: localhost:{{ etcd_port(int): 2379 }}
  use:
    embed: true # in this process
  data:
    dir: {{ etcd_data_dir }}
log:
  file:
    rootPath: {{ system_log_path }} # none
common:
  storageType: local # please adjust
"""


def test_settings_file_has_the_values_of_the_real_image() -> None:
    found = yaml.safe_load(recipe.settings_file(TEMPLATE))
    assert found["etcd"] == {"endpoints": "localhost:2379", "use": {"embed": False}, "data": {"dir": "default.etcd"}}
    assert found["common"]["storageType"] == "remote"
    assert found["gpu"] == {"initMemSize": 2048, "maxMemSize": 4096}
    with pytest.raises(ValueError, match=r"expected a line with 'embed: true'"):
        recipe.settings_file("etcd:\n")


def test_image_runs_as_the_real_one_does(tmp_path: Path) -> None:
    built = recipe.assemble([], tmp_path)
    config = json.loads(built.config)["config"]
    assert (config["Entrypoint"], config["Cmd"]) == (["/tini", "--"], ["milvus", "run", "standalone"])
    assert (config["WorkingDir"], sorted(config["ExposedPorts"])) == ("/milvus", ["19530/tcp", "9091/tcp"])
    assert config["Labels"]["org.gpulab.stand-in"] == "simulated"
    with tarfile.open(built.layers[-1].path) as tar:
        assert {member.name: member.mode for member in tar if member.isfile()} == {
            "opt/milvus/entry.py": 0o644, "tini": 0o755,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "user", "expected"),
    [
        ({}, None, 2048),
        ({}, "gpu:\n  initMemSize: 512\n", 512),
        ({}, "log:\n  level: warn\n", 2048),
        ({"GPU_INITMEMSIZE": "64"}, "gpu:\n  initMemSize: 512\n", 64),
    ],
)
def test_pool_is_found_as_milvus_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], user: str | None, expected: int
) -> None:
    (tmp_path / "milvus.yaml").write_text(recipe.GPU)
    if user is not None:
        (tmp_path / "user.yaml").write_text(user)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert entry.pool_mib(entry.settings(tmp_path)) == expected


@pytest.fixture
def loopback() -> Iterator[list[str]]:
    with network() as words:
        yield words


@pytest.fixture
def serve(loopback: list[str], tmp_path: Path) -> Serve:
    """A server of this version over the same data at each call; gives its log."""
    data = tmp_path / "data"
    settings = {
        "etcd": {"use": {"embed": True}, "data": {"dir": str(data / "etcd")}},
        "localStorage": {"path": str(data / "files")},
        "rocksmq": {"path": str(data / "queue")},
        "common": {"storageType": "local", "gracefulStopTimeout": 3, "security": {"authorizationEnabled": True}},
        "gpu": {"initMemSize": 256},
        "log": {"level": "warn"},
    }
    return lambda pin: serving(pin, tmp_path, loopback, settings)


CLIENT = """
import sys
from pymilvus import DataType, MilvusClient, MilvusException

def attempt(call):
    try:
        return call()
    except MilvusException as error:
        return error.message

client = MilvusClient("http://127.0.0.1:19530", token="root:Milvus")
if sys.argv[1] == "fill":
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="HNSW", metric_type="L2", params={"M": 8, "efConstruction": 32})
    client.create_collection("sky", schema=schema, index_params=index)
    client.insert("sky", [{"id": n, "vector": [float(n), 0.0]} for n in range(20)])
    gpu = client.prepare_index_params()
    gpu.add_index("vector", index_type="GPU_CAGRA", metric_type="L2", params={"graph_degree": 32})
    print(attempt(lambda: client.create_collection("gpu", schema=schema, index_params=gpu)))
    print(attempt(lambda: MilvusClient("http://127.0.0.1:19530", token="root:wrong").list_users()))
client.load_collection("sky")
print([hit["id"] for hit in client.search("sky", data=[[7.2, 0.0]], limit=2, consistency_level="Strong")[0]])
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a network namespace")
@pytest.mark.parametrize("first", [recipe.NOW, recipe.EARLIER])
def test_server_answers_a_search_and_so_does_the_one_after_it(serve: Serve, loopback: list[str], first: str) -> None:
    def client(what: str) -> list[str]:
        words = [*loopback, sys.executable, "-c", CLIENT, what]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with serve(first) as log:
        refused, denied, found = client("fill")
        assert "invalid index type: GPU_CAGRA" in refused
        assert denied.startswith("Fail connecting")
        assert found == "[7, 8]"
        assert "milvus: simulated: " in log.read_text()
    with serve(recipe.NOW):
        assert client("search") == ["[7, 8]"]
