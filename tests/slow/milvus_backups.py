# SPDX-License-Identifier: MIT
"""`gpulab-milvus` as a guest has it, beside a real server: its files in a folder of the test's."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operations.containers.milvus import backup, service
from tests.rehearsal.test_milvus_deploy import URI, milvus

#: What a user's program begins with: `A` is root's client of database astro, `D` pymilvus' types.
CLIENT = """
import json, logging, sys
from pymilvus import DataType as D, MilvusClient
logging.disable()
uri, database = sys.argv[1:3]
A = MilvusClient(uri, token="root:Milvus", db_name=database, timeout=20)
HNSW = ("HNSW", "L2", {"M": 8, "efConstruction": 32})
def make(name, vector=D.FLOAT_VECTOR, dim=4, key=D.INT64, index=HNSW, load=True, more=(), auto_id=False, dynamic=True,
         **words):
    schema = A.create_schema(enable_dynamic_field=dynamic, auto_id=auto_id)
    schema.add_field("key", key, is_primary=True, **({"max_length": 64} if key == D.VARCHAR else {}))
    schema.add_field("vector", vector, dim=dim)
    for field, kind, params in more:
        schema.add_field(field, kind, **params)
    A.create_collection(name, schema=schema, **words)
    if index:
        params = A.prepare_index_params()
        params.add_index("vector", index_type=index[0], metric_type=index[1], params=index[2])
        A.create_index(name, params)
    if index and load:
        A.load_collection(name)
def rows(name, where="", **words):
    if A.get_load_state(name)["state"].name != "Loaded":
        A.load_collection(name)
    return sorted(map(dict, A.query(name, filter=where or "key >= 0", output_fields=["*"], limit=1000,
                  consistency_level="Strong", **words)), key=lambda row: row["key"])
"""


def settings(folder: Path) -> dict[str, Any]:
    """The server's user.yaml as a deploy writes it, its data in `folder`."""
    text = json.dumps(service.settings(milvus(), "storage-secret")).replace(service.DATA, str(folder / "data"))
    found: dict[str, Any] = json.loads(text)
    return found


@dataclass
class Guest:
    """The program, its settings, and root's login; `folder` stands for the guest's disk."""

    loopback: list[str]
    folder: Path
    keep: int = 2

    def __post_init__(self) -> None:
        self.backups = self.folder / "milvus-backups"
        self.program = self.folder / "gpulab-milvus"
        texts = backup.wanted_files(str(self.folder), self.keep)
        own = (texts[backup.PROGRAM].content, texts[backup.SETTINGS].content)
        program, told = (
            text.replace("/etc/gpulab/", f"{self.folder}/etc/").replace("/run/gpulab/", f"{self.folder}/run/")
            for text in own
        )
        self.program.write_text(program)
        (self.folder / "etc").mkdir(exist_ok=True)
        # The test's folder is no disk of its own.
        (self.folder / "etc/milvus-backup.json").write_text(json.dumps({**json.loads(told), "disk": "/"}))
        login = {"uri": URI, "user": "root", "password": "Milvus"}
        (self.folder / "etc/milvus.root.json").write_text(json.dumps(login))

    def words(self, *arguments: str) -> list[str]:
        return [*self.loopback, sys.executable, str(self.program), *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.words(*arguments), capture_output=True, text=True, timeout=180, check=False)

    def done(self, *arguments: str) -> str:
        """What a command says that succeeds."""
        done = self.run(*arguments)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    def refused(self, *arguments: str) -> str:
        """What a command says that does not."""
        done = self.run(*arguments)
        assert done.returncode == 1, (arguments, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stderr.strip()

    def client(self, body: str, database: str = "astro") -> Any:
        """What a user's program prints last, as JSON."""
        words = [*self.loopback, sys.executable, "-c", CLIENT + body, URI, database]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(words, capture_output=True, text=True, timeout=180, check=False, env=environment)
        assert done.returncode == 0, (body, done.stdout, done.stderr)
        logging.debug(done.stdout)
        last = done.stdout.strip().splitlines()
        return json.loads(last[-1]) if last else None

    def manifest(self) -> dict[str, Any]:
        """Of the newest backup."""
        path = max(self.backups.glob("2*[!l]/manifest.json"))
        found: dict[str, Any] = json.loads(path.read_text())
        return found
