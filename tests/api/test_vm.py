# SPDX-License-Identifier: MIT
"""The VM's steps against a Proxmox API that nobody of this project wrote the rules of (fakepve, its schema)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from inventory import GpulabError
from operations.proxmox import vm
from operations.proxmox.client import Client

from .conftest import Bench


def read(api: Any) -> dict[str, Any]:
    keys: dict[str, Any] = api.api().nodes("pve1").qemu(101).config.get()
    return keys


def use_mapping(api: Any) -> None:
    entry = "id=10de:24b0,iommugroup=14,node=pve1,path=0000:01:00,subsystem-id=10de:14ad"
    api.api().cluster.mapping.pci.post(id="a4000", map=[entry])


def test_created_vm_is_what_was_declared_and_stays_so(api: Any, bench: Bench) -> None:
    api.add_image()
    use_mapping(api)

    assert bench.apply(vm.create_or_update) == 1
    assert bench.commands(vm.create_or_update) == []

    keys = read(api)
    assert keys["tags"] == "gpulab"
    assert keys["hostpci0"] == "mapping=a4000,pcie=1"
    assert "size=64G" in keys["scsi0"]
    assert "size=200G" in keys["scsi1"]


def test_plan_shows_each_key_of_a_new_vm(api: Any, bench: Bench) -> None:
    bench.commands(vm.create_or_update)

    assert "create VM 101 on pve1" in bench.plan
    assert "memory: absent -> 2048" in bench.plan
    assert api.api().nodes("pve1").qemu.get() == []


def test_only_what_differs_is_changed(api: Any, bench: Bench) -> None:
    api.add_image()
    use_mapping(api)
    bench.apply(vm.create_or_update)
    api.api().nodes("pve1").qemu(101).config.put(cores=1, description="hands off", hostpci1="mapping=a4000")

    bench.apply(vm.create_or_update)

    keys = read(api)
    assert (keys["cores"], keys["description"]) == (2, "hands off")
    assert "hostpci1" not in keys
    assert "cores: 1 -> 2" in bench.plan
    assert "hostpci1: mapping=a4000 -> absent" in bench.plan


def test_vm_without_our_tag_is_never_touched(api: Any, bench: Bench) -> None:
    api.add_vm(101, name="mail", memory=512)

    for step in (vm.preflight, vm.create_or_update):
        with pytest.raises(GpulabError, match="a VM of that id that is not ours") as caught:
            bench.commands(step)
        assert "'mail'" in str(caught.value)
    assert read(api)["name"] == "mail"


@pytest.mark.parametrize(
    ("privilege", "path"),
    [
        ("VM.Config.Cloudinit", "/vms"),
        ("Datastore.AllocateSpace", "/storage/local-lvm"),
        ("Mapping.Use", "/mapping/pci"),
        ("Sys.AccessNetwork", "/nodes/pve1"),
        ("SDN.Use", "/sdn/zones/localnetwork"),
    ],
)
def test_missing_privilege_is_named_with_its_path(api: Any, bench: Bench, privilege: str, path: str) -> None:
    api.take_away(privilege)

    with pytest.raises(GpulabError, match=rf"the API token lacks {privilege} on {path}"):
        bench.commands(vm.preflight)


def test_revoked_token_is_named_and_not_shown(api: Any, bench: Bench) -> None:
    api.revoke_token()

    with pytest.raises(GpulabError, match="the API refuses the token") as caught:
        bench.commands(vm.preflight)
    assert api.token not in str(caught.value)


def test_storage_without_import_is_named(api: Any, bench: Bench) -> None:
    api.set_content("local", "iso,backup")

    with pytest.raises(GpulabError, match="storage local: expected content type import, seen: iso, backup"):
        bench.commands(vm.preflight)


def test_gpu_in_use_by_another_running_vm_is_named(api: Any, bench: Bench) -> None:
    use_mapping(api)
    api.add_vm(300, running=True, name="render", hostpci0="mapping=a4000,pcie=1")

    with pytest.raises(GpulabError, match=r"gpu = 'a4000': VM 300 \(render\) is using it"):
        bench.commands(vm.preflight)


def test_more_memory_than_the_node_has_is_refused(api: Any, bench_of: Callable[..., Bench]) -> None:
    bench = bench_of(memory_mib=2**24)

    with pytest.raises(GpulabError, match=r"memory_mib = 16777216: pve1 has \d+ MiB for it"):
        bench.commands(vm.preflight)


def test_all_is_well_after_installation(api: Any, bench: Bench) -> None:
    assert bench.commands(vm.preflight) == []


def test_59x_is_tried_again(api: Any, bench: Bench) -> None:
    api.answer(599, times=2, method="GET")

    assert bench.commands(vm.preflight) == []


def test_lost_reply_to_a_creation_is_looked_up_and_not_sent_twice(api: Any, bench: Bench) -> None:
    api.add_image()
    use_mapping(api)
    api.drop_reply("POST", "/nodes/pve1/qemu$")

    bench.apply(vm.create_or_update)

    assert [path for method, path in api.requests if method == "POST"].count("/nodes/pve1/qemu") == 1
    assert read(api)["name"] == "gpu01"


def test_failed_task_is_shown_with_its_own_words(api: Any, bench: Bench) -> None:
    api.add_image()
    use_mapping(api)
    bench.apply(vm.create_or_update)
    lab_client = Client(_node(bench))

    with pytest.raises(GpulabError, match="task resize failed: shrinking disks is not supported"):
        lab_client.run_task(
            "PUT", "nodes", "pve1", "qemu", 101, "resize", task="resize", deadline_s=20, disk="scsi0", size="1G"
        )


def test_wrong_certificate_is_refused(api: Any, bench: Bench) -> None:
    (bench.folder / "state" / "ca" / "pve1.pem").write_text(_other_ca())

    with pytest.raises(GpulabError, match="certificate does not check against"):
        bench.commands(vm.preflight)


def test_locked_vm_is_an_error_of_this_host(api: Any, bench: Bench) -> None:
    api.add_image()
    use_mapping(api)
    bench.apply(vm.create_or_update)
    api.api().nodes("pve1").qemu(101).config.put(cores=1)
    api.lock_vm(101)

    with pytest.raises(AssertionError, match=r"VM is locked \(backup\)"):
        bench.apply(vm.create_or_update)


def test_image_is_downloaded_once(api: Any, bench: Bench) -> None:
    assert len(bench.commands(vm.image)) == 1
    api.add_image()
    assert bench.commands(vm.image) == []


def _node(bench: Bench) -> Any:
    import inventory

    return inventory.of_run(bench.state).nodes["pve1"]


def _other_ca() -> str:
    import tempfile
    from pathlib import Path

    from rehearsal import ca

    with tempfile.TemporaryDirectory() as folder:
        return ca.authority(Path(folder)).certificate.read_text()
