# SPDX-License-Identifier: MIT
"""What a guest runs on its card: Ollama, Milvus and PyTorch, each one declared container with a share of the memory.

docs/ollama.md, docs/milvus.md and docs/pytorch.md say what each key does; inventory/budgets.py what a share comes to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, model_validator

from inventory.access import tenants_of
from inventory.model import AbsolutePath, Model, Name, Sha256

if TYPE_CHECKING:
    from inventory.schema import Guest

Digest = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][^@\s]*@sha256:[0-9a-f]{64}$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Environment = dict[Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$")], str]
ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._/-]+(:[A-Za-z0-9._-]+)?$")]
#: Go's notation, as Ollama reads it: `5m`, `1h30m`; a negative one is for ever, 0 at once.
Duration = Annotated[str, StringConstraints(pattern=r"^(0|-1|([0-9]+(\.[0-9]+)?(ms|s|m|h))+)$")]


def filled_in(value: str) -> str:
    """Refuse the zeros that inventory/lab.py ships where only its user knows the digest."""
    if value.endswith(64 * "0"):
        raise ValueError("the digest that the publisher states, in place of the zeros")
    return value


Image = Annotated[Digest, AfterValidator(filled_in)]


#: Variables of `environment` that come from elsewhere in the inventory, and the keys to use in their place; None: what
#: gpulab says is not to be changed.
Keys = Mapping[str, str | None]

#: Those that make a process a client of the GPU: inventory/sharing.py.
OF_THE_GPU: Keys = {
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "nvidia.mps.active_thread_percentage",
    "CUDA_MPS_CLIENT_PRIORITY": None,
    "CUDA_MPS_LOG_DIRECTORY": "nvidia.sharing",
    "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "memory_budget_mib",
    "CUDA_MPS_PIPE_DIRECTORY": "nvidia.sharing",
    "CUDA_VISIBLE_DEVICES": "gpu",
    "NVIDIA_VISIBLE_DEVICES": "gpu",
}


#: Those that hold a job to its share, or tell it whose it is: gpulab-run sets them.
OF_A_JOB = ("GPULAB_TENANT", "GPULAB_TORCH_MEMORY_FRACTION", "PYTHONPATH", "VIRTUAL_ENV")


class Service(Model):
    """One container of ours: recreated exactly when its declaration changes."""

    #: Variables that `environment` may not hold, beside OF_THE_GPU's.
    taken: ClassVar[Keys] = {}

    #: Name and digest, `ollama/ollama@sha256:…`: a tag can change behind one's back.
    image: Image
    #: Port on the guest's loopback address, and of the proxy on the guest's own address.
    port: Port
    #: Device memory that this service may use, MiB. The sum over a card may not exceed its memory.
    memory_budget_mib: int = Field(ge=256)
    #: Limit of main memory, MiB. None: none.
    host_memory_mib: int | None = Field(default=None, ge=64)
    #: Seconds that a new container has to answer and be healthy; after them the one before comes back.
    ready_s: int = Field(default=180, ge=1)
    #: Further settings of the service. What gpulab sets itself can't be set here.
    environment: Environment = {}

    @model_validator(mode="after")
    def environment_is_free(self) -> Self:
        taken = {**OF_THE_GPU, **self.taken}
        for name in self.environment:
            if name in taken:
                key = taken[name]
                instead = f"`{key}` in place of {name}" if key else f"no {name}, which gpulab sets"
                raise ValueError(f"{instead} in `environment`")
        return self

    def ports(self) -> list[int]:
        """Those it has on the guest, `port` first."""
        return [self.port]


class OllamaModel(Model):
    """A model that Ollama must have."""

    #: As `ollama list` shows it; without a tag `latest` is meant.
    name: ModelName
    #: SHA-256 as `/api/tags` has it (`ollama list` shows its start). None: what the name stands for when it is pulled.
    digest: Sha256 | None = None
    #: A GGUF file on the guest, below the data disk, that the model is made of. None: it is pulled.
    gguf: AbsolutePath | None = None
    #: SHA-256 of that file.
    gguf_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def of_a_file(self) -> OllamaModel:
        if (self.gguf is None) != (self.gguf_sha256 is None):
            raise ValueError("`gguf` and `gguf_sha256` together")
        if self.gguf is not None and self.digest is not None:
            raise ValueError("`digest` or `gguf`, whose own digest it is")
        return self

    @property
    def full_name(self) -> str:
        """With its tag, as Ollama lists it."""
        return self.name if ":" in self.name.rpartition("/")[2] else f"{self.name}:latest"


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class Ollama(Service):
    """Ollama: its models lie on the data disk."""

    taken: ClassVar[Keys] = {
        "HOME": "data_disk.mount",
        "OLLAMA_CONTEXT_LENGTH": "context_length",
        "OLLAMA_FLASH_ATTENTION": "flash_attention",
        "OLLAMA_GPU_OVERHEAD": "memory_budget_mib",
        "OLLAMA_HOST": "port",
        "OLLAMA_KEEP_ALIVE": "keep_alive",
        "OLLAMA_KV_CACHE_TYPE": "kv_cache_type",
        "OLLAMA_LOAD_TIMEOUT": "load_timeout",
        "OLLAMA_MAX_LOADED_MODELS": "max_loaded_models",
        "OLLAMA_MAX_QUEUE": "max_queue",
        "OLLAMA_MODELS": "data_disk.mount",
        "OLLAMA_NO_CLOUD": None,
        "OLLAMA_NUM_PARALLEL": "parallel",
    }

    port: Port = 11434
    memory_budget_mib: int = Field(default=8192, ge=256)
    #: Tokens of context a request; with `parallel` the main consumer of memory beside the weights.
    context_length: int = Field(default=8192, ge=256)
    #: Requests that one loaded model answers at the same time; each has a context of its own.
    parallel: int = Field(default=1, ge=1, le=64)
    #: Models in memory at the same time. More than one shares the budget among them.
    max_loaded_models: int = Field(default=1, ge=1, le=16)
    #: Requests that may wait; those beyond get HTTP 503.
    max_queue: int = Field(default=128, ge=1)
    #: How long a model stays in memory after its last request.
    keep_alive: Duration = "5m"
    #: How long loading a model may take.
    load_timeout: Duration = "5m"
    flash_attention: bool = True
    #: `q8_0` halves the memory of the context, `q4_0` quarters it; both need flash attention.
    kv_cache_type: Literal["f16", "q8_0", "q4_0"] = "f16"
    #: Models that must be present, by name or as `OllamaModel`; absent ones are pulled.
    models: list[Annotated[OllamaModel, BeforeValidator(_named)]] = []
    #: Remove models that are not declared. False: they stay and are listed.
    prune_models: bool = False

    @model_validator(mode="after")
    def consistent(self) -> Ollama:
        if self.kv_cache_type != "f16" and not self.flash_attention:
            raise ValueError(f"`flash_attention` beside `kv_cache_type` {self.kv_cache_type}")
        names = [model.full_name for model in self.models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"each of `models` once; got {', '.join(twice)} twice")
        return self


#: Names that a user or database of Milvus has already, or a secret of gpulab's (`milvus.NAME`).
MILVUS_RESERVED = ("default", "root", "storage")

#: Milvus' own limit of `limit` for GPU indexes (milvus.io, gpu-index-overview).
GPU_TOP_K = 1024


class _Index(Model):
    #: L2 for positions on the sky: a float32 dot product loses arc minutes there.
    metric: Literal["L2", "IP", "COSINE"] = "L2"
    #: The most neighbours that a search asks for.
    top_k: int = Field(default=100, ge=1, le=16384)

    @property
    def on_gpu(self) -> bool:
        return False


class _GpuIndex(_Index):
    top_k: int = Field(default=100, ge=1, le=GPU_TOP_K)

    @model_validator(mode="after")
    def no_cosine(self) -> _GpuIndex:
        if self.metric == "COSINE":
            raise ValueError("`metric` L2 or IP: GPU indexes know no COSINE; normalise the vectors and use IP")
        return self

    @property
    def on_gpu(self) -> bool:
        return True


class GpuCagra(_GpuIndex):
    """A graph, built and searched on the GPU; with `adapt_for_cpu` searched on the CPU."""

    type: Literal["GPU_CAGRA"]
    intermediate_graph_degree: int = Field(default=128, ge=2)
    graph_degree: int = Field(default=64, ge=1)
    build_algo: Literal["IVF_PQ", "NN_DESCENT"] = "IVF_PQ"
    cache_dataset_on_device: bool = False
    #: The card's memory is then needed for the build alone.
    adapt_for_cpu: bool = False
    #: Candidates that a search on the CPU keeps; only, and always, with `adapt_for_cpu`.
    ef: int | None = Field(default=None, ge=1, le=32768)
    #: Intermediate results of a search on the GPU: a power of two, at least `top_k`.
    itopk_size: int = Field(default=128, ge=1)

    @model_validator(mode="after")
    def consistent(self) -> GpuCagra:
        if self.graph_degree >= self.intermediate_graph_degree:
            raise ValueError(
                f"`graph_degree` below `intermediate_graph_degree` ({self.intermediate_graph_degree}), "
                f"got {self.graph_degree}"
            )
        if self.adapt_for_cpu != (self.ef is not None):
            raise ValueError("`ef` with `adapt_for_cpu`, and not without")
        if self.ef is not None and self.ef < self.top_k:
            raise ValueError(f"`ef` at least `top_k` ({self.top_k}), got {self.ef}")
        if self.itopk_size & (self.itopk_size - 1) or self.itopk_size < self.top_k:
            raise ValueError(f"`itopk_size` a power of two and at least `top_k` ({self.top_k}), got {self.itopk_size}")
        return self


class GpuIvfFlat(_GpuIndex):
    """Clusters of whole vectors on the GPU."""

    type: Literal["GPU_IVF_FLAT"]
    nlist: int = Field(default=1024, ge=1, le=65536)
    #: Clusters that a search looks into.
    nprobe: int = Field(default=16, ge=1, le=65536)

    @model_validator(mode="after")
    def consistent(self) -> GpuIvfFlat:
        if self.nprobe > self.nlist:
            raise ValueError(f"`nprobe` at most `nlist` ({self.nlist}), got {self.nprobe}")
        return self


class GpuBruteForce(_GpuIndex):
    """No index: each search compares with every vector, exactly."""

    type: Literal["GPU_BRUTE_FORCE"]


class Hnsw(_Index):
    """A graph on the CPU, for a guest without GPU or a card that is needed elsewhere."""

    type: Literal["HNSW"]
    m: int = Field(default=16, ge=2, le=2048)
    ef_construction: int = Field(default=200, ge=8)
    #: Candidates that a search keeps, at least `top_k`.
    ef: int = Field(default=128, ge=1, le=32768)

    @model_validator(mode="after")
    def consistent(self) -> Hnsw:
        if self.ef < self.top_k:
            raise ValueError(f"`ef` at least `top_k` ({self.top_k}), got {self.ef}")
        return self


IndexProfile = Annotated[GpuCagra | GpuIvfFlat | GpuBruteForce | Hnsw, Field(discriminator="type")]


class Collection(Model):
    """A collection that must be there: an integer key `id`, a vector `vector`, and whatever else a row brings."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,254}$")]
    #: The tenant in whose database it lies.
    tenant: Name
    #: Numbers (float32) of a vector.
    dimension: int = Field(ge=2, le=32768)
    #: A name of `indexes`.
    index: Name


class Milvus(Service):
    """Milvus standalone: one container with its own etcd and its own files, all of them on the data disk."""

    taken: ClassVar[Keys] = {"COMMON_SECURITY_AUTHORIZATIONENABLED": None}

    port: Port = 19530
    #: Port on the loopback address that tells health and metrics.
    metrics_port: Port = 9091
    memory_budget_mib: int = Field(default=3072, ge=1024)
    ready_s: int = Field(default=240, ge=1)
    #: Device memory that its pool takes at the start, MiB; the most it takes follows from the budget.
    pool_init_mib: int = Field(default=1024, ge=1)
    #: Named ways to index; a collection names one, and users find them in the guest's /etc/gpulab/milvus.json.
    indexes: dict[Name, IndexProfile] = {}
    collections: list[Collection] = []
    #: Backups without a label that stay; one is made before each change of `image`.
    keep_backups: int = Field(default=3, ge=1)

    def ports(self) -> list[int]:
        return [self.port, self.metrics_port]

    @model_validator(mode="after")
    def consistent(self) -> Milvus:
        if self.port == self.metrics_port:
            raise ValueError(f"`metrics_port` other than `port` ({self.port})")
        seen: set[tuple[str, str]] = set()
        for collection in self.collections:
            if collection.index not in self.indexes:
                known = ", ".join(sorted(self.indexes)) or "none"
                raise ValueError(
                    f"`index` of collection {collection.name} among `indexes` ({known}), got {collection.index}"
                )
            if (collection.tenant, collection.name) in seen:
                raise ValueError(
                    f"each collection of a tenant once; got {collection.name} of {collection.tenant} twice"
                )
            seen.add((collection.tenant, collection.name))
        return self


class PyTorch(Model):
    """PyTorch jobs of the tenants, each in a container of its own (`gpulab-run`); their shares are the tenants'."""

    image: Image
    #: A requirements file with hashes on the control machine: what jobs find beside the image's own packages.
    #: None: the image's alone.
    lock: str | None = None
    #: The longest that a job may run, hours; what `gpulab-run --time-limit` may ask for at most.
    time_limit_h: float = Field(default=24, gt=0, le=24 * 366)
    #: Main memory of a job, MiB. None: no limit.
    host_memory_mib: int | None = Field(default=None, ge=64)
    #: /dev/shm of a job, MiB: data loaders pass batches through it.
    shm_mib: int = Field(default=1024, ge=64)
    #: `bridge`: jobs may reach the network, `none`: they may not.
    network: Literal["bridge", "none"] = "bridge"
    #: Named settings of jobs beside `deterministic`: environment variables.
    profiles: dict[Name, Environment] = {}

    @model_validator(mode="after")
    def consistent(self) -> PyTorch:
        if "deterministic" in self.profiles:
            raise ValueError("another name than deterministic, which is gpulab's own profile")
        for name, environment in self.profiles.items():
            if wrong := sorted(environment.keys() & {*OF_THE_GPU, *OF_A_JOB}):
                raise ValueError(f"no {', '.join(wrong)} in `profiles.{name}`: gpulab sets it")
        return self


class Services(Model):
    ollama: Ollama | None = None
    milvus: Milvus | None = None
    pytorch: PyTorch | None = None

    def declared(self) -> Mapping[str, Service | PyTorch]:
        """All that the guest runs, by name."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    def served(self) -> Mapping[str, Service]:
        """Those that listen on a port and have a budget of their own, by name."""
        return {name: value for name, value in self.declared().items() if isinstance(value, Service)}


def problems(guest: Guest) -> list[str]:
    """What its services ask for that the guest does not have: lines of the inventory's errors."""
    services, found = guest.services, []
    if guest.gpu is None:
        needing = [name for name in ("ollama", "pytorch") if name in services.declared()]
        found += [f"services.{name}: expected `gpu` beside it" for name in needing]
    names = [tenant.name for tenant in guest.tenants]
    ports: dict[int, str] = {}
    for name, each in services.served().items():
        own = {f"services.{name}.port": each.port}
        if isinstance(each, Milvus):
            own[f"services.{name}.metrics_port"] = each.metrics_port
        for key, port in own.items():
            if port in ports:
                found.append(f"{key} = {port}: expected another than {ports[port]}")
            ports[port] = key
    for number, tenant in enumerate(guest.tenants):
        if absent := [name for name in tenant.services or [] if name not in services.declared()]:
            declared = ", ".join(services.declared()) or "none"
            found.append(
                f"tenants.{number}.services: {', '.join(absent)}: expected of the guest's services ({declared})"
            )
    if services.ollama is not None:
        below = f"{guest.data_disk.mount}/"
        found += [
            f"services.ollama.models.{number}.gguf = {model.gguf!r}: expected a file below {below}"
            for number, model in enumerate(services.ollama.models)
            if model.gguf is not None and (not model.gguf.startswith(below) or "/../" in model.gguf)
        ]
    if services.milvus is not None:
        if guest.gpu is None:
            found += [
                f"services.milvus.indexes.{name}.type = {index.type!r}: expected HNSW: the guest has no GPU"
                for name, index in services.milvus.indexes.items()
                if index.on_gpu
            ]
        using = tenants_of(guest, "milvus")
        found += [
            f"services.milvus.collections.{number}.tenant = {each.tenant!r}: expected a tenant that may use milvus "
            f"({', '.join(using) or 'none'})"
            for number, each in enumerate(services.milvus.collections)
            if each.tenant not in using
        ]
        found += [
            f"tenants.{number}.name = {tenant.name!r}: expected at most 32 characters that start with a letter, and "
            f"none of {', '.join(MILVUS_RESERVED)}: a tenant that may use milvus is a user and a database there"
            for number, tenant in enumerate(guest.tenants)
            if tenant.name in using
            and (tenant.name in MILVUS_RESERVED or len(tenant.name) > 32 or not tenant.name[0].isalpha())
        ]
    if services.pytorch is not None and guest.engine.kind != "docker":
        found.append(f"services.pytorch: expected `engine.kind` docker beside it, got {guest.engine.kind}")
    if services.pytorch is not None and not names:
        found.append("services.pytorch: expected `tenants` beside it: a job runs with a tenant's share")
    return found
