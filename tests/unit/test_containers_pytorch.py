# SPDX-License-Identifier: MIT
"""What PyTorch jobs need: the lock file, the environment's name, what is missing, the hook, the shares."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory import GpulabError, budgets
from operations.containers.remote import pytorch as remote_pytorch
from operations.containers.remote import pytorch_environment
from operations.remote import common

# The package has a function of the module's name.
pytorch = importlib.import_module("operations.containers.pytorch")
HOOK = Path(pytorch.__file__ or "").parent / "remote/torch_hook.py"
IMAGE = f"pytorch/pytorch@sha256:{64 * 'a'}"
HASH = f"--hash=sha256:{64 * '0'}"
GROUPS = ["gpulab-astro"]


def settings(network: str = pytorch.NETWORK) -> dict[str, Any]:
    return {"image": IMAGE, "uid": 850, "network": network}


def converged(name: str = "") -> dict[str, Any]:
    """What a guest says that has all."""
    return {
        "image": True,
        "network": True,
        "environments": {name: {"whole": True}} if name else {},
        "current": name or None,
        "groups": {"gpulab-astro": 990},
        "folders": {"gpulab-astro": [850, 990, 0o2770]},
        "logs": {"gpulab-astro": [0, 990, 0o2750]},
    }


def test_converged_guest_misses_nothing() -> None:
    assert pytorch.missing(converged(), settings(), GROUPS, "") == {}
    assert pytorch.missing(converged("abc"), settings(), GROUPS, "abc") == {}


@pytest.mark.parametrize(
    ("change", "order"),
    [
        ({"image": False}, {"image": IMAGE}),
        ({"network": False}, {"network": pytorch.NETWORK}),
        ({"folders": {"gpulab-astro": [0, 990, 0o2770]}}, {"folders": GROUPS}),
        ({"logs": {"gpulab-astro": None}}, {"folders": GROUPS}),
        ({"environments": {"old": {"whole": True}}, "current": "old"}, {"environment": "abc", "current": "abc"}),
        ({"environments": {"abc": {"whole": False}}}, {"environment": "abc"}),
        ({"current": "old"}, {"current": "abc"}),
    ],
)
def test_what_is_missing_is_made_and_nothing_else(change: dict[str, Any], order: dict[str, Any]) -> None:
    assert pytorch.missing({**converged("abc"), **change}, settings(), GROUPS, "abc") == order


def test_guest_that_does_not_exist_misses_all() -> None:
    order = pytorch.missing({}, settings(), GROUPS, "abc")
    assert set(order) == {"image", "network", "groups", "folders", "environment", "current"}


def test_network_is_made_for_the_build_alone_where_jobs_have_none() -> None:
    found = {**converged("abc"), "network": False}
    assert pytorch.missing(found, settings("none"), GROUPS, "abc") == {}
    assert "network" in pytorch.missing(found, settings("none"), GROUPS, "new")


@pytest.mark.parametrize(
    "text", ["einops==0.8.2\n", f"einops>=0.8 {HASH}\n", f"einops==0.8.2 {HASH}\nother==1\n", "-r other.txt\n"]
)
def test_lock_without_hashes_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lock.txt"
    path.write_text(text)
    with pytest.raises(GpulabError, match="has no version with a hash"):
        pytorch.lock_text(str(path))


def test_lock_with_continued_lines_and_comments_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "lock.txt"
    path.write_text(f"# made by pip-compile\neinops==0.8.2 \\\n    {HASH}\n    # via -r in.txt\n")
    assert pytorch.lock_text(str(path)) == path.read_text()
    with pytest.raises(GpulabError, match="No such file"):
        pytorch.lock_text(str(tmp_path / "none"))
    assert pytorch.lock_text(None) == ""


@given(st.text(min_size=1), st.text(min_size=1))
def test_environment_follows_from_image_and_lock(first: str, second: str) -> None:
    assert (pytorch.environment_name(IMAGE, first) == pytorch.environment_name(IMAGE, second)) is (first == second)
    assert pytorch.environment_name(IMAGE, first) != pytorch.environment_name(f"{IMAGE}b", first)


@given(st.integers(256, 16376))
def test_workers_never_get_more_than_the_share(budget: int) -> None:
    shares = budgets.torch_shares(budget, 16376) or []
    for workers, share in enumerate(shares, start=1):
        each = int(str(share["pinned"]).removeprefix("0=").removesuffix("M"))
        assert workers * each <= budget
        assert float(share["fraction"]) * 16376 + budgets.CONTEXT_MIB <= budget / workers + 1 or share["fraction"] == 0
    assert 1 <= len(shares) <= budgets.MOST_WORKERS
    assert budgets.torch_shares(None, 16376) is None


TORCH = """
class Version: cuda = {cuda!r}
version = Version
said = []
class cuda:
    @staticmethod
    def _lazy_call(call): said.append("lazy"); call()
    @staticmethod
    def set_per_process_memory_fraction(value): said.append(value)
class backends:
    class cudnn: benchmark = True; deterministic = False
def use_deterministic_algorithms(value): said.append(["deterministic", value])
"""
SAY = "import json, torch; print(json.dumps([torch.said, torch.backends.cudnn.benchmark]))"


@pytest.mark.parametrize(
    ("cuda", "environment", "said"),
    [
        ("13.0", {"GPULAB_TORCH_MEMORY_FRACTION": "0.25"}, [["lazy", 0.25], True]),
        (None, {"GPULAB_TORCH_MEMORY_FRACTION": "0.25"}, [[], True]),
        ("13.0", {}, [[], True]),
        (None, {"GPULAB_TORCH_DETERMINISTIC": "1"}, [[["deterministic", True]], False]),
    ],
)
def test_hook_settles_torch_when_it_is_imported(
    tmp_path: Path, cuda: str | None, environment: dict[str, str], said: object
) -> None:
    (tmp_path / "torch.py").write_text(TORCH.format(cuda=cuda))
    (tmp_path / "sitecustomize.py").write_bytes(HOOK.read_bytes())
    words = [sys.executable, "-c", SAY]
    done = subprocess.run(words, env={"PYTHONPATH": str(tmp_path), **environment}, capture_output=True, check=True)
    assert json.loads(done.stdout) == said


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("pip 23.0.1 from /x (python 3.11)", []),
        ("pip 24.1.2 from /x (python 3.11)", []),
        ("pip 24.2 from /x (python 3.13)", ["--use-deprecated", "legacy-certs"]),
        ("pip 26.1b1 from /x (python 3.13)", ["--use-deprecated", "legacy-certs"]),
        ("", []),
    ],
)
def test_pip_asks_the_declared_index_and_trusts_its_ca_alone(version: str, words: list[str]) -> None:
    index = ["--index-url", "https://192.0.2.1/simple", "--cert", "/ca.pem"]
    assert common.pip_words(version, "https://192.0.2.1/simple", "/ca.pem") == index + words
    assert common.pip_words(version, "", "") == []


ENVIRONMENT_CHANGES = {
    "a byte": lambda folder: (folder / "lib/einops.py").write_text("x = 2"),
    "a file more": lambda folder: (folder / "lib/sitecustomize.py").touch(),
    "a file less": lambda folder: (folder / "lib/einops.py").unlink(),
    "a mode": lambda folder: (folder / "lib").chmod(0o777),
    "a link": lambda folder: [(folder / "python").unlink(), (folder / "python").symlink_to("/tmp/python")],
}


@pytest.mark.parametrize("change", ENVIRONMENT_CHANGES.values(), ids=ENVIRONMENT_CHANGES)
def test_environment_that_somebody_changed_is_not_whole(tmp_path: Path, change: Callable[[Path], object]) -> None:
    made = tmp_path / "abc"
    (made / "lib").mkdir(parents=True)
    (made / "lib/einops.py").write_text("x = 1")
    os.utime(made / "lib/einops.py", (1, 1))
    (made / "python").symlink_to("/usr/bin/python3")
    (made / "gpulab.json").write_text(json.dumps({"versions": {}, "state": pytorch_environment.state(str(made))}))
    (tmp_path / ".new").mkdir()
    (tmp_path / "current").symlink_to("abc")
    whole = {"abc": {"versions": {}, "whole": True}}
    assert remote_pytorch.environments(str(tmp_path)) == whole

    change(made)

    assert remote_pytorch.environments(str(tmp_path)) == {"abc": {**whole["abc"], "whole": False}}


def test_environment_with_a_broken_description_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "abc").mkdir()
    for text in ("{", "[]", "{}"):
        (tmp_path / "abc/gpulab.json").write_text(text)
        assert remote_pytorch.environments(str(tmp_path)) == {"abc": {"versions": {}, "whole": False}}


@pytest.mark.parametrize(
    ("said", "brief"),
    [
        ("WARNING: Retrying after connection broken by 'X'\nERROR: No matching distribution found for einops",
         "pytorch: the Python index does not answer"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
         "pytorch: the index has another file than the lock names"),
        ("ERROR: No matching distribution found for einops",
         "pytorch: the Python index has no such package for this image's Python"),
        ("/srv/data: the data disk is not mounted", "pytorch: /srv/data: the data disk is not mounted"),
    ],
)  # fmt: skip
def test_what_a_failed_build_means(said: str, brief: str) -> None:
    assert pytorch._not_made(said).brief == brief
