# SPDX-License-Identifier: MIT
"""Every check in words: a title that is a sentence, the promised values, and what was found where it holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import inventory
from tests.verify.healthy import ROOT, TOKEN, Doctored, Verified, healthy, lab_file, verify
from verify.facts import facts
from verify.observations import Observation
from verify.promises import promised, shown, title_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Verified:
    return verify(lab_file(tmp_path_factory.mktemp("words")), "--disruptive", plugin=Doctored(healthy()))


def test_titles_are_sentences_that_no_other_check_of_the_host_has(run: Verified) -> None:
    titles = {(result["host"], result["id"]): result["title"] for result in run.results}

    assert len({(host, title) for (host, _), title in titles.items()}) == len(titles)
    for title in titles.values():
        words = title.partition(" (")[0].split()
        assert len(words) > 1 and title[0] != "_" and "  " not in title, title
        # A word that has a spelling of its own is in SPELLED.
        assert not {"gpu", "vm", "mps", "cdi", "ollama", "milvus", "ssh", "api", "tls"} & set(words), title


@pytest.mark.parametrize(
    ("function", "parts", "title"),
    [
        ("test_vm_runs", {}, "VM runs"),
        ("test_vfio_pci_drives_every_function_of_the_cards", {}, "vfio-pci drives every function of the cards"),
        ("test_next_boot_loads_a_kernel_with_vfio_pci", {}, "Next boot loads a kernel with vfio-pci"),
        ("test_cloud_init_is_told_addresses_and_names", {}, "cloud-init is told addresses and names"),
        ("test_gpu_is_visible_in_the_container", {"service": "ollama"}, "GPU is visible in the container (ollama)"),
        ("test_declared_cuda_toolkits_compile", {}, "Declared CUDA toolkits compile"),
    ],
)
def test_title_is_the_functions_name(function: str, parts: dict[str, str], title: str) -> None:
    assert title_of(function, parts) == title


def test_every_check_that_passes_says_what_it_found(run: Verified) -> None:
    # What of a lab is not declared has nothing to be found.
    assert {result["id"] for result in run.results if not result["message"]} == set()


@pytest.mark.parametrize(
    ("id_", "promise"),
    [
        ("vm.cores", "cores = 8"),
        ("vm.pinning", "affinity = 0-7; hugepages = 1G"),
        ("vm.onboot", "onboot = yes"),
        ("hypervisor.vfio.bound", "passthrough.devices.address = a4000: 0000:01:00"),
        ("hypervisor.hugepages", "passthrough.hugepages = size: 1G, count: 16"),
        ("nvidia.gpu.link", "card.link_width = 16"),
        ("nvidia.driver.branch", "nvidia.branch = 580; nvidia.version = not declared"),
        ("nvidia.gpu.thermal", "nvidia.thermal = defaults"),
        ("containers.ollama.budget", "services.ollama = 8192 MiB"),
        ("containers.tenants.astro.budget", "tenants.astro = 6144 MiB"),
        ("containers.ollama.token.accepted", "tenants = astro, ml"),
        ("vm.backup.age", "backup.max_age_h = 26"),
        ("vm.pending", ""),
    ],
)
def test_promise_is_the_inventorys_value(run: Verified, id_: str, promise: str) -> None:
    assert run.result(id_)["promise"] == promise


def test_what_is_not_declared_says_so(tmp_path: Path) -> None:
    guest = {"nvidia": {"thermal": None}, "tenants": [], "services": {}, "startup": None, "tags": []}
    lab = inventory.load(lab_file(tmp_path, guest=guest))
    keys = ("nvidia.thermal.critical_c", "services.ollama.port", "startup", "tags", "tenants.memory_limit_mib")

    assert promised(lab, lab.guests["gpu01"], keys, {}) == (
        "nvidia.thermal.critical_c = not declared; services.ollama.port = not declared; startup = not declared; "
        "tags = none; tenants.memory_limit_mib = none"
    )


def test_models_without_a_name_are_kept_apart() -> None:
    assert shown([{"a": 1, "b": True}, {"a": None}]) == "(a: 1, b: yes), (a: not declared)"


def test_no_promise_tells_a_secret(run: Verified) -> None:
    assert TOKEN.partition("=")[2] not in "".join(result["promise"] for result in run.results)


def test_check_that_names_a_key_that_is_none_is_refused(tmp_path: Path) -> None:
    plugin = tmp_path / "other.py"
    plugin.write_text(
        "import pytest\n"
        "def pytest_itemcollected(item):\n"
        "    mark = item.get_closest_marker('promise')\n"
        "    if mark and mark.args[0] == 'vm.cores':\n"
        "        item.own_markers.insert(0, pytest.mark.promise('vm.cores', 'coers', fix='x').mark)\n"
    )
    command = [sys.executable, "-m", "pytest", "verify", "-p", "no:cacheprovider", "-p", "other"]

    done = subprocess.run(
        [*command, f"--lab={lab_file(tmp_path)}", f"--report={tmp_path / 'report'}"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 4
    assert re.search(r"test_vm_has_its_cores.*a key of @promise names nothing: .*coers", done.stderr)


def test_facts_are_what_was_read_anyway(run: Verified) -> None:
    assert run.json["facts"]["pve1"] == {
        "Proxmox VE": "9.1.4",
        "kernel": "6.14.8-2-pve",
        "next kernel": "6.14.8-2-pve",
        "CPU vendor": "GenuineIntel",
    }
    found = run.json["facts"]["gpu01"]
    assert found["GPU"] == "NVIDIA RTX A4000 (16376 MiB)"
    assert (found["NVIDIA driver"], found["kernel"]) == ("580.95.05", "6.12.48+deb13-amd64")
    assert (found["container engine"], found["Ollama"], found["PyTorch"]) == ("26.1.5+dfsg1", "0.32.0", "2.13.0")
    assert found["data disk"] == "200 GiB, ext4"


def test_fact_that_was_not_read_is_left_out() -> None:
    seen = {("gpu01", "nvidia"): Observation({"loaded": "580.95.05", "nvml": {"gpus": [{}]}, "policy": None})}

    assert facts(seen) == {"gpu01": {"NVIDIA driver": "580.95.05"}}
