# SPDX-License-Identifier: MIT
"""CDI specifications on a guest: whose devices a file describes, and which one is a second description of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from operations.nvidia.remote import toolkit

#: As nvidia-ctk writes it: the names of hooks and variables are no devices.
YAML = """\
---
cdiVersion: 0.7.0
kind: nvidia.com/gpu
devices:
    - name: "0"
      containerEdits:
        deviceNodes:
            - path: /dev/nvidia0
    - name: all
containerEdits:
    hooks:
        - hookName: createContainer
          path: /usr/bin/nvidia-cdi-hook
"""
JSON = '{"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "devices": [{"name": "tenant-a"}]}'


def test_devices_of_a_specification() -> None:
    assert toolkit.device_names(YAML) == {"0", "all"}
    assert toolkit.device_names(JSON) == {"tenant-a"}
    assert toolkit.device_names(YAML.replace("nvidia.com/gpu", "nvidia.com/gpu-other")) == set()
    assert toolkit.device_names("") == set()


def test_second_description_of_ours_is_told_from_a_device_of_somebodys_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    etc, run = tmp_path / "etc", tmp_path / "run"
    monkeypatch.setattr(toolkit, "FOLDERS", (str(etc), str(run)))
    for folder in (etc, run):
        folder.mkdir()
    (run / "nvidia.yaml").write_text(YAML)
    (etc / "nvidia.yaml").write_text(YAML.replace("/dev/nvidia0", "/dev/nvidia7"))
    (etc / "tenants.json").write_text(JSON)
    (etc / "disk.yaml").write_text(YAML.replace("nvidia.com/gpu", "example.com/disk"))

    assert toolkit.seconds(str(run / "nvidia.yaml"), {"0", "all"}) == [str(etc / "nvidia.yaml")]
    # Before ours is written, too.
    assert toolkit.seconds(str(run / "absent.yaml"), set()) == [str(etc / "nvidia.yaml"), str(run / "nvidia.yaml")]
