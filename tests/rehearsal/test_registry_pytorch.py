# SPDX-License-Identifier: MIT
"""What `lab/pytorch` takes of wheels, and that images are built one by one."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from inventory import GpulabError
from rehearsal.registry import oci, server, service
from rehearsal.registry.pytorch import recipe, wheels
from rehearsal.registry.recipe import Base, Recipe, Workshop


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("torch/__init__.py", True),
        ("torch/include/torch/script.h", False),
        ("torch/lib/libtorch.a", False),
        ("torch/testing/__init__.py", True),
        ("numpy/linalg/tests/test_linalg.py", False),
        ("sympy/core/", False),
        ("../outside.py", False),
    ],
)
def test_image_holds_what_programs_read(name: str, taken: bool) -> None:
    assert wheels.wanted(name) is taken


def test_wheel_becomes_a_layer_with_its_program_and_compiled_modules(tmp_path: Path) -> None:
    path = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/__init__.py", "def main():\n    return 0\n")
        archive.writestr("tiny-1.dist-info/entry_points.txt", "[console_scripts]\ntiny-run = tiny:main\n")
    made = wheels.layer([path], tmp_path / "one", tmp_path)
    again = wheels.layer([path], tmp_path / "two", tmp_path)
    assert made.digest == again.digest
    with tarfile.open(made.path) as tar:
        modes = {member.name: member.mode for member in tar if member.isfile()}
    assert modes["usr/local/bin/tiny-run"] == 0o755
    assert modes[f"{wheels.SITE}/tiny/__init__.py"] == 0o644
    assert f"{wheels.SITE}/tiny/__pycache__/__init__.cpython-311.pyc" in modes


def test_image_says_that_it_is_a_stand_in(tmp_path: Path) -> None:
    config = json.loads(recipe.assemble([], tmp_path).config)["config"]
    assert config["Labels"]["org.gpulab.stand-in"] == "simulated"
    assert "simulated" in recipe.ENTRY


def test_only_the_changed_image_is_built_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    files = {name: tmp_path / f"{name}.py" for name in ("one", "two", "rare")}

    def made(name: str, on_request: bool = False) -> Recipe:
        def build(workshop: Workshop) -> oci.Image:
            built.append(name)
            layer = workshop.layer(name, lambda: oci.layer_of_files({name: files[name]}, workshop.layers))
            return oci.image([layer], oci.Settings(["/x"]))

        files[name].write_text("1")
        return Recipe(name, Base("trixie", ()), [files[name]], build, on_request=on_request)

    class Store:
        """Keeps blobs where a registry does."""

        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def push(self, repository: str, pushed: oci.Image) -> str:
            blobs = {pushed.digest: pushed.manifest, oci.sha256(pushed.config): pushed.config}
            blobs |= {layer.digest: layer.path.read_bytes() for layer in pushed.layers}
            for digest, content in blobs.items():
                path = service.stored(self.folder, digest)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            return pushed.digest

    import contextlib

    monkeypatch.setenv("GPULAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rehearsal.registry.recipe.base_key", lambda base: "base")
    monkeypatch.setattr(service, "RECIPES", (made("one"), made("two"), made("rare", on_request=True)))
    monkeypatch.setattr(server, "fetch", lambda *_: None)
    monkeypatch.setattr(server, "program", lambda *_: Path("/bin/false"))
    monkeypatch.setattr(server, "temporary", lambda store, *_: contextlib.nullcontext(Store(store)))
    first = service.prepare(lambda _: None)
    assert built == ["one", "two"]
    service.prepare(lambda _: None)
    assert built == ["one", "two"]
    files["two"].write_text("2")
    second = service.prepare(lambda _: None)
    assert built == ["one", "two", "two"]
    assert second["one"] == first["one"]
    assert service.stored(service.cache() / "store", second["one"].partition("@")[2]).exists()
    assert set(service.prepare(lambda _: None, also=["rare"])) == {"one", "two", "rare"}
    assert built[3:] == ["rare"]
    with pytest.raises(GpulabError, match="No image of the lab: none"):
        service.prepare(lambda _: None, also=["none"])
