# SPDX-License-Identifier: MIT
"""verify's reading of the simulated card, through the real nvidia-ml-py and with a client that works."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.rehearsal.test_nvidia_card import Card
from tests.rehearsal.test_nvidia_card import card as card
from tests.rehearsal.test_nvidia_card import programs as programs
from verify.hosts import whole
from verify.nvidia import remote


def read(card: Card, folder: Path, client: str = "{}") -> dict[str, Any]:
    """The first GPU as the script reads it, in a process of its own, sent as verify sends it.

    + client: Python for what a client of MPS needs
    """
    module = importlib.util.find_spec("pynvml")
    assert module is not None and module.origin is not None
    (folder / "sent").mkdir()
    shutil.copy(module.origin, folder / "sent")
    script = whole(Path(remote.__file__)).partition("if __name__")[0]
    code = f"{script}\nimport json; print(json.dumps(read_nvml({str(folder / 'sent')!r}, {client})['gpus'][0]))"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=card.environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_card_is_read_at_rest_and_at_work(card: Card, tmp_path: Path) -> None:
    gpu = read(card, tmp_path)

    work = gpu["work"]
    # At rest the generation is 1.
    assert (work["error"], work["generation"], work["width"], work["by"]) == ("", 4, 16, [])
    assert (gpu["power_limit_w"], gpu["replays"], gpu["processes"]) == (140.0, [0, 0], [])
    # The counters of ECC, which is off.
    assert [key for key, value in gpu.items() if value is None] == ["ecc_uncorrected"]


def test_slow_link_shows_at_work(card: Card, tmp_path: Path) -> None:
    card.faults(link_generation=2, link_width=8, event_reasons=0x80)

    work = read(card, tmp_path)["work"]

    assert (work["generation"], work["width"], work["reasons"]) == (2, 8, 0x80)


def test_users_of_the_card_are_left_alone(card: Card, tmp_path: Path) -> None:
    client = card.client(100)
    try:
        assert client.stdout is not None and client.stdout.readline().split() == ["0", "0", "0"]
        gpu = read(card, tmp_path)
        assert [user["pid"] for user in gpu["processes"]] == [client.pid]
        assert (len(gpu["work"]["by"]), gpu["work"]["generation"], gpu["work"]["error"]) == (1, 4, "")
    finally:
        client.communicate("")


@pytest.mark.parametrize(("faults", "by"), [({}, 0), ({"utilization_percent": 30}, 1), ({"memory_used_mib": 15500}, 1)])
def test_idle_users_of_mps_leave_room_for_a_client(card: Card, tmp_path: Path, faults: dict[str, int], by: int) -> None:
    card.faults(link_generation=3, **faults)
    client = card.client(100)
    try:
        assert client.stdout is not None and client.stdout.readline().split() == ["0", "0", "0"]
        work = read(card, tmp_path, "{'env': dict(os.environ)}")["work"]
        assert (len(work["by"]), work["error"], work["generation"]) == (by, "", 3)
    finally:
        client.communicate("")


def test_client_that_cannot_work_says_why(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card.environment["CUDA_VISIBLE_DEVICES"] = ""

    assert read(card, tmp_path)["work"]["error"] == "cuInit: CUDA_ERROR_NO_DEVICE (100)"
