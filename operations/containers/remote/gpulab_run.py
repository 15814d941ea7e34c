# SPDX-License-Identifier: MIT
"""gpulab-run: run a PyTorch job in a container with a tenant's share of the GPU. docs/pytorch.md says how.

gpulab-run --tenant astro --time-limit 2h -- python train.py --epochs 10
gpulab-run --tenant astro --workers 2 -- train.py
gpulab-run --tenant astro --shell
"""

import argparse
import contextlib
import fcntl
import grp
import json
import os
import pwd
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import IO, Any

SETTINGS = "/etc/gpulab/pytorch.json"
TENANTS = "/etc/gpulab/tenants"
LOCKS = "/run/gpulab/jobs"
LOGS = "/var/log/gpulab/jobs"
#: Labels of a job's container.
TENANT = "org.gpulab.tenant"
LIMIT = "org.gpulab.job.limit"
#: Where a tenant's folder, its environment and the hook lie in the container.
WORKSPACE = "/workspace"
ENVIRONMENT = "/opt/gpulab/environment"
HOOK = "/opt/gpulab/hook"
#: Exit status of a job that took too long: timeout(1)'s.
TIMED_OUT = 124
#: Seconds between SIGTERM and SIGKILL.
GRACE_S = 30
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONHASHSEED": "0", "GPULAB_TORCH_DETERMINISTIC": "1"}


class Refused(Exception):
    """What is asked for can't be; its text says why, and what could."""


def seconds(text: str) -> float:
    """A duration: `90`, `90s`, `30m`, `2h`, `1h30m`."""
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not text or parts is None:
        raise argparse.ArgumentTypeError(f"expected a duration as 2h, 30m or 1h30m, got {text!r}")
    hours, minutes, rest = (int(part or 0) for part in parts.groups())
    if not (total := hours * 3600 + minutes * 60 + rest):
        raise argparse.ArgumentTypeError("expected more than nothing")
    return total


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="gpulab-run", description="Run a PyTorch job with a tenant's share of the GPU.", allow_abbrev=False
    )
    made.add_argument("--tenant", help="whose share it runs with")
    made.add_argument("--workdir", default=".", metavar="DIR", help="folder below the tenant's own to start in")
    made.add_argument("--time-limit", type=seconds, metavar="TIME", help="how long it may run: 2h, 30m")
    made.add_argument("--workers", type=int, metavar="N", help="run with torchrun, as N processes")
    made.add_argument("--profile", action="append", default=[], metavar="NAME", help="named settings: deterministic")
    made.add_argument("--log", metavar="FILE", help="the log, below the tenant's own folder")
    made.add_argument("--name", help="what --list and --stop call it")
    made.add_argument("--shell", action="store_true", help="an interactive shell in place of a command")
    made.add_argument("--no-wait", action="store_true", help="refuse when a job of the tenant runs")
    made.add_argument("--list", action="store_true", help="list running jobs")
    made.add_argument("--stop", metavar="NAME", help="end a running job")
    made.add_argument("command", nargs="*", help="the command, after --")
    return made


def caller() -> str:
    """Who asks: the name of the user behind sudo, or root.

    Raises:
        Refused: neither root nor sudo.
    """
    if os.geteuid() != 0:
        raise Refused("only root talks to the container engine: sudo gpulab-run …")
    uid = int(os.environ.get("SUDO_UID", "0"))
    return pwd.getpwuid(uid).pw_name


def may_use(user: str, tenant: str) -> bool:
    """Root may use every tenant's share, others that of tenants whose group they are in."""
    if user == "root":
        return True
    try:
        group = grp.getgrnam(f"gpulab-{tenant}")
    except KeyError:
        return False
    return group.gr_gid in os.getgrouplist(user, pwd.getpwnam(user).pw_gid)


def share(settings: dict[str, Any], tenant: str, workers: int) -> dict[str, Any]:
    """What each of so many processes gets of the tenant's share: `fraction` and `pinned`.

    Raises:
        Refused: no such tenant, or its share does not do.
    """
    declared = settings["tenants"]
    if tenant not in declared:
        raise Refused(f"no tenant {tenant}; there are {', '.join(sorted(declared)) or 'none'}")
    shares = declared[tenant]["shares"]
    if shares is None:
        raise Refused(f"tenant {tenant} has no `memory_limit_mib` in the inventory: it has no share to run a job with")
    if not 1 <= workers <= len(shares):
        raise Refused(f"--workers {workers}: the share of {tenant} does for {len(shares)} processes at most")
    found: dict[str, Any] = shares[workers - 1]
    return found


def environment(settings: dict[str, Any], options: argparse.Namespace, given: dict[str, Any]) -> dict[str, str]:
    """What a job finds in its environment beside the tenant's file.

    Raises:
        Refused: no such profile.
    """
    profiles = {**settings["profiles"], "deterministic": DETERMINISTIC}
    found = {"HOME": "/tmp", "PYTHONPATH": HOOK, "GPULAB_TENANT": options.tenant}
    for name in options.profile:
        if name not in profiles:
            raise Refused(f"no profile {name}; there are {', '.join(sorted(profiles))}")
        found.update(profiles[name])
    found["GPULAB_TORCH_MEMORY_FRACTION"] = f"{given['fraction']:.6f}"
    if settings["client"]["environment"]:
        found["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = given["pinned"]
    if settings["environment"]:
        found["VIRTUAL_ENV"] = ENVIRONMENT
    return found


def container(settings: dict[str, Any], options: argparse.Namespace, limit_s: float, gid: int) -> list[str]:
    """The words of `docker run` for a job."""
    workers = options.workers or 1
    given = share(settings, options.tenant, workers)
    uid, client = settings["uid"], settings["client"]
    words = ["docker", "run", "--rm", "--init", "--name", options.name, "--hostname", "job"]
    words += ["--add-host", "job:127.0.0.1", "--label", f"{TENANT}={options.tenant}", "--label", f"{LIMIT}={limit_s:g}"]
    words += ["--user", f"{uid}:{uid}", "--group-add", str(gid), "--network", settings["network"]]
    words += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--read-only", "--tmpfs", "/tmp"]
    words += ["--device", "nvidia.com/gpu=all", "--stop-timeout", str(GRACE_S)]
    # A shared IPC namespace brings the guest's own /dev/shm.
    words += ["--ipc", client["ipc"]] if client["ipc"] else ["--shm-size", f"{settings['shm_mib']}m"]
    words += ["--memory", f"{settings['host_memory_mib']}m"] if settings["host_memory_mib"] else []
    words += ["--env-file", f"{TENANTS}/{options.tenant}.env"]
    for key, value in environment(settings, options, given).items():
        words += ["--env", f"{key}={value}"]
    binds = {settings["tenants"][options.tenant]["folder"]: WORKSPACE, **client["mounts"]}
    read_only = {settings["hook"]: HOOK}
    if settings["environment"]:
        read_only[settings["environment"]] = ENVIRONMENT
    for source, target in binds.items():
        words += ["--mount", f"type=bind,source={source},target={target}"]
    for source, target in read_only.items():
        words += ["--mount", f"type=bind,source={source},target={target},readonly"]
    words += ["--workdir", inside(settings["tenants"][options.tenant]["folder"], options.workdir)]
    words += ["--interactive", "--tty"] if options.shell else []
    return [*words, settings["image"], *program(settings, options)]


def program(settings: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """What runs in the container. The image's own PATH stays behind the environment's programs."""
    if options.shell:
        command = ["bash"]
    elif options.workers:
        # `python` in front is what a user of one process types.
        words = options.command[1:] if options.command[0] in ("python", "python3") else options.command
        command = ["torchrun", "--standalone", f"--nproc-per-node={options.workers}", *words]
        if settings["environment"]:
            command = [f"{ENVIRONMENT}/bin/python", "-m", "torch.distributed.run", *command[1:]]
    else:
        command = options.command
    if not settings["environment"]:
        return command
    return ["sh", "-c", f'PATH="{ENVIRONMENT}/bin:$PATH"; exec "$@"', "sh", *command]


def inside(folder: str, path: str) -> str:
    """Where a path of a tenant's folder lies in the container. There alone is it looked up, links and all.

    Raises:
        Refused: it lies outside.
    """
    whole = os.path.normpath(os.path.join(folder, path))
    if whole != folder and not whole.startswith(f"{folder}/"):
        raise Refused(f"--workdir {path}: expected a folder below {folder}")
    if not os.path.isdir(whole):
        raise Refused(f"--workdir {path}: there is no folder {whole}")
    return WORKSPACE + whole[len(folder) :]


def open_log(settings: dict[str, Any], options: argparse.Namespace) -> IO[bytes]:
    """The job's log, appended to. A file of the tenant's is opened with the rights of its jobs, never with root's.

    Raises:
        Refused: it lies outside of the tenant's folder, or can't be written.
    """
    if options.log is None:
        folder = f"{LOGS}/{options.tenant}"
        return open(f"{folder}/{options.name}.log", "ab", buffering=0)
    folder = settings["tenants"][options.tenant]["folder"]
    path = os.path.normpath(os.path.join(folder, options.log))
    uid = settings["uid"]
    groups = os.getgroups()
    try:
        os.setgroups([grp.getgrnam(f"gpulab-{options.tenant}").gr_gid])
        os.setegid(uid)
        os.seteuid(uid)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise Refused(f"--log {options.log}: {error.strerror}: {path}") from None
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
    if not os.path.realpath(f"/proc/self/fd/{handle}").startswith(f"{os.path.realpath(folder)}/"):
        os.close(handle)
        raise Refused(f"--log {options.log}: expected a file below {folder}")
    return os.fdopen(handle, "ab", buffering=0)


def jobs(tenant: str | None = None) -> list[dict[str, Any]]:
    """Running jobs: `name`, `tenant`, `status`, `limit`."""
    form = f'{{{{.Names}}}}\t{{{{.Label "{TENANT}"}}}}\t{{{{.Status}}}}\t{{{{.Label "{LIMIT}"}}}}'
    chosen = f"label={TENANT}" + (f"={tenant}" if tenant else "")
    done = subprocess.run(
        ["docker", "ps", "--filter", chosen, "--format", form], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Refused(f"the container engine does not answer: {done.stderr.strip()}")
    keys = ("name", "tenant", "status", "limit")
    return [dict(zip(keys, line.split("\t"), strict=True)) for line in done.stdout.splitlines()]


@contextlib.contextmanager
def turn(options: argparse.Namespace) -> Iterator[None]:
    """One job of a tenant at a time, as its share is for one: those beyond wait, or are refused.

    The lock goes with its holder; a container that has outlived a killed gpulab-run counts, too.

    Raises:
        Refused: a job runs, and the caller would not wait.
    """
    os.makedirs(LOCKS, mode=0o700, exist_ok=True)
    with open(f"{LOCKS}/{options.tenant}.lock", "w") as lock:
        said = False
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not jobs(options.tenant):
                    break
                fcntl.flock(lock, fcntl.LOCK_UN)
            if options.no_wait:
                raise Refused(f"a job of {options.tenant} runs already (gpulab-run --list)")
            if not said:
                print(f"gpulab-run: waiting: a job of {options.tenant} runs", file=sys.stderr, flush=True)
                said = True
            time.sleep(1)
        yield


def run(settings: dict[str, Any], options: argparse.Namespace, user: str) -> int:
    """Run the job; returns its exit status."""
    longest = settings["time_limit_h"] * 3600
    limit_s = options.time_limit or longest
    if limit_s > longest:
        raise Refused(f"--time-limit: at most {settings['time_limit_h']:g}h")
    if not options.shell and not options.command:
        raise Refused("expected a command after --, or --shell")
    if options.shell and not sys.stdin.isatty():
        raise Refused("--shell: expected a terminal")
    gid = grp.getgrnam(f"gpulab-{options.tenant}").gr_gid
    words = container(settings, options, limit_s, gid)
    with turn(options), open_log(settings, options) as log:
        stand_in = f" simulated ({settings['simulated']})" if settings["simulated"] else ""
        note(log, f"start {options.name} tenant={options.tenant} user={user} limit={limit_s:g}s{stand_in}")
        status = execute(words, options, limit_s, log)
        note(log, f"end {options.name} exit={status}" + (" (time limit)" if status == TIMED_OUT else "") + stand_in)
    return status


def note(log: IO[bytes], text: str) -> None:
    log.write(f"gpulab-run: {datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n".encode())


def execute(words: list[str], options: argparse.Namespace, limit_s: float, log: IO[bytes]) -> int:
    """The container until it ends, of itself, by the clock or by a signal of ours."""
    late = threading.Event()

    def stop() -> None:
        subprocess.run(["docker", "stop", "--time", str(GRACE_S), options.name], capture_output=True, check=False)

    def expire() -> None:
        late.set()
        print(f"gpulab-run: {options.name} is over its time limit and ends", file=sys.stderr, flush=True)
        stop()

    clock = threading.Timer(limit_s, expire)
    clock.daemon = True
    piped = {} if options.shell else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # A session of its own: a Ctrl-C is for us to pass on, by way of the engine.
    process = subprocess.Popen(words, start_new_session=not options.shell, **piped)  # type: ignore[call-overload]
    for number in (signal.SIGTERM, signal.SIGHUP, *([] if options.shell else [signal.SIGINT])):
        signal.signal(number, lambda *_: threading.Thread(target=stop).start())
    clock.start()
    while process.stdout is not None and (chunk := os.read(process.stdout.fileno(), 65536)):
        log.write(chunk)
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
    status = int(process.wait())
    clock.cancel()
    return TIMED_OUT if late.is_set() else status


def main() -> int:
    options = parser().parse_args()
    try:
        user = caller()
        try:
            with open(SETTINGS) as file:
                settings = json.load(file)
        except FileNotFoundError:
            raise Refused(f"{SETTINGS} is missing: this guest runs no PyTorch jobs") from None
        if options.list:
            for job in jobs():
                if may_use(user, job["tenant"]):
                    print(f"{job['name']}\t{job['tenant']}\t{job['status']}\tlimit {job['limit']}s")
            return 0
        if options.stop:
            found = [job for job in jobs() if job["name"] == options.stop and may_use(user, job["tenant"])]
            if not found:
                raise Refused(f"--stop {options.stop}: no such job of yours runs")
            return subprocess.run(["docker", "stop", "--time", str(GRACE_S), options.stop], check=False).returncode
        if not options.tenant:
            raise Refused("expected --tenant")
        if not may_use(user, options.tenant):
            raise Refused(f"{user} is not in the group gpulab-{options.tenant}")
        options.name = options.name or f"job-{options.tenant}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
        if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,99}", options.name):
            raise Refused(f"--name {options.name!r}: expected letters, digits, dots, hyphens and underscores")
        return run(settings, options, user)
    except Refused as error:
        print(f"gpulab-run: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
