# SPDX-License-Identifier: MIT
"""What the lab calls: `prepare()` builds the images into the cache, `start()` serves them under the lab's CA.

Each image is built again only when its own sources changed; layers that did not change are taken from the store.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inventory import GpulabError
from rehearsal import ca, network, paths, processes
from rehearsal.registry import oci, server
from rehearsal.registry.milvus.recipe import BEFORE as MILVUS_BEFORE
from rehearsal.registry.milvus.recipe import RECIPE as MILVUS
from rehearsal.registry.ollama.recipe import RECIPE as OLLAMA
from rehearsal.registry.pytorch.recipe import RECIPE as PYTORCH
from rehearsal.registry.recipe import Recipe, Workshop

PORT = 5000
PROCESS = "registry"
RECIPES = (OLLAMA, MILVUS, MILVUS_BEFORE, PYTORCH)


def cache() -> Path:
    """The folder of the built images: `store/` is the registry's, `images.json` names them by digest."""
    return paths.cache() / "registry"


def programs() -> Path:
    """Where docker-registry is unpacked to when it is not installed."""
    return cache() / "programs"


def host() -> str:
    """`address:port` under which the lab's hosts know the registry."""
    return f"{network.current().gateway}:{PORT}"


@dataclass
class Built:
    """What `built.json` says of the store: image to its key and digest, and the layers by the keys of theirs."""

    images: dict[str, dict[str, str]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)


def prepare(report: Callable[[str], None] = print, also: Collection[str] = ()) -> dict[str, str]:
    """Build the images unless the cache has them from the same sources; returns name -> reference by digest.

    `also` names images that are built on request alone.

    Raises:
        GpulabError: a build step failed, or `also` names none of the lab's images.
    """
    if unknown := set(also) - {recipe.name for recipe in RECIPES}:
        raise GpulabError(f"No image of the lab: {', '.join(sorted(unknown))}")
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    server.fetch(programs(), report)
    known = _known(folder)
    keys = {recipe.name: recipe.key() for recipe in RECIPES}
    current = {
        name: entry
        for name, entry in known.images.items()
        if keys.get(name) == entry["key"] and stored(folder / "store", entry["digest"]).exists()
    }
    wanted = [
        recipe
        for recipe in RECIPES
        if recipe.name not in current and (not recipe.on_request or recipe.name in also)
    ]  # fmt: skip
    if wanted:
        known = _build(folder, wanted, keys, Built(current, known.layers), report)
    references = {name: f"{host()}/lab/{name}@{entry['digest']}" for name, entry in known.images.items()}
    _write(folder / "images.json", references)
    return references


def read() -> dict[str, str]:
    """What `prepare()` built: name -> reference by digest."""
    found: dict[str, str] = json.loads((cache() / "images.json").read_text())
    return found


def start() -> dict[str, dict[str, str]]:
    """Serve the store over TLS on the bridge until the lab goes down.

    Returns:
        `registry_ca` (registry to the PEM file of its CA) and `images` (name to reference by digest).
    """
    gateway = network.current().gateway
    authority = ca.authority(paths.ca())
    if not processes.running(PROCESS):
        pair = authority.issue("registry", [gateway])
        settings = server.write_settings(
            paths.lab() / "registry.yml", cache() / "store", gateway, PORT, pair.certificate, pair.key
        )
        processes.start(PROCESS, [str(server.program(programs())), "serve", str(settings)])
    server.wait(oci.Registry(f"https://{host()}", authority.certificate))
    return {"registry_ca": {host(): str(authority.certificate)}, "images": read()}


def _known(folder: Path) -> Built:
    """What the store holds."""
    try:
        return Built(**json.loads((folder / "built.json").read_text()))
    except FileNotFoundError:
        return Built()


def _build(
    folder: Path, recipes: Collection[Recipe], keys: dict[str, str], known: Built, report: Callable[[str], None]
) -> Built:
    """Build the images of `recipes`; push them and the `known` ones into a new store, which takes the old one's place.

    A new store holds nothing that no image needs, and nobody sees half of it.
    """
    old = folder / "store"
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        layers = {
            key: oci.Layer(path, **entry)
            for key, entry in known.layers.items()
            if (path := stored(old, entry["digest"])).exists()
        }
        workshop = Workshop(scratch, report, layers)
        images = {image: _stored_image(old, entry["digest"]) for image, entry in known.images.items()}
        images |= {recipe.name: recipe.build(workshop) for recipe in recipes}
        with server.temporary(scratch / "store", scratch / "registry.yml", server.program(programs())) as registry:
            digests = {image: registry.push(f"lab/{image}", built) for image, built in images.items()}
        used = {layer.digest for built in images.values() for layer in built.layers}
        result = Built(
            {image: {"key": keys[image], "digest": digest} for image, digest in digests.items()},
            {key: _entry(layer) for key, layer in workshop.known.items() if layer.digest in used},
        )
        (folder / "built.json").unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        (scratch / "store").rename(old)
    _write(folder / "built.json", asdict(result))
    return result


def stored(store: Path, digest: str) -> Path:
    """Where the registry keeps a blob."""
    value = digest.removeprefix("sha256:")
    return store / "docker/registry/v2/blobs/sha256" / value[:2] / value / "data"


def _stored_image(store: Path, digest: str) -> oci.Image:
    """An image of the store, as it was pushed."""
    manifest = stored(store, digest).read_bytes()
    parsed = json.loads(manifest)
    config = stored(store, parsed["config"]["digest"]).read_bytes()
    diff_ids = json.loads(config)["rootfs"]["diff_ids"]
    layers = [
        oci.Layer(stored(store, entry["digest"]), entry["digest"], entry["size"], diff_id)
        for entry, diff_id in zip(parsed["layers"], diff_ids, strict=True)
    ]
    return oci.Image(manifest, config, tuple(layers))


def _entry(layer: oci.Layer) -> dict[str, Any]:
    return {"digest": layer.digest, "size": layer.size, "diff_id": layer.diff_id}


def _write(path: Path, value: object) -> None:
    """Never into the file that is there: another cache may have it, too."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=2) + "\n")
    new.replace(path)
