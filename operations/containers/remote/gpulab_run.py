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
import queue
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import IO, Any, NoReturn

SETTINGS = "/etc/gpulab/pytorch.json"
TENANTS = "/etc/gpulab/tenants"
LOCKS = "/run/gpulab/jobs"
LOGS = "/var/log/gpulab/jobs"
#: Labels of a job's container.
TENANT = "org.gpulab.tenant"
NAME = "org.gpulab.job"
LIMIT = "org.gpulab.job.limit"
#: Where a tenant's folder, its environment and the hook lie in the container.
WORKSPACE = "/workspace"
ENVIRONMENT = "/opt/gpulab/environment"
HOOK = "/opt/gpulab/hook"
#: Exit status of a job that took too long: timeout(1)'s.
TIMED_OUT = 124
#: The engine's for a container that it could not start, or has lost, and for one that was ended by SIGKILL.
ENGINE_FAILED, KILLED = 125, 137
#: Seconds between SIGTERM and SIGKILL.
GRACE_S = 30
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONHASHSEED": "0", "GPULAB_TORCH_DETERMINISTIC": "1"}


class Refused(Exception):
    """What is asked for can't be; its text says why, and what could."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message} (gpulab-run --help)")


def seconds(text: str) -> float:
    """A duration: `90`, `90s`, `30m`, `2h`, `1h30m`."""
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not text or parts is None:
        raise argparse.ArgumentTypeError(f"expected a duration as 2h, 30m or 1h30m, got {text!r}")
    hours, minutes, rest = (int(part or 0) for part in parts.groups())
    if not (total := hours * 3600 + minutes * 60 + rest):
        raise argparse.ArgumentTypeError(f"expected more than nothing, got {text!r}")
    return total


def parser() -> argparse.ArgumentParser:
    made = Parser(
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
    uid = os.environ.get("SUDO_UID", "0")
    try:
        return pwd.getpwuid(int(uid)).pw_name
    except (ValueError, KeyError):
        raise Refused(f"SUDO_UID={uid} is no user of this guest") from None


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
        Refused: its share does not do.
    """
    shares = settings["tenants"][tenant]["shares"]
    if shares is None:
        raise Refused(f"tenant {tenant} has no `memory_limit_mib` in the inventory: it has no share to run a job with")
    if not 1 <= workers <= len(shares):
        raise Refused(f"--workers {workers}: expected 1 to {len(shares)}, which the share of {tenant} does for")
    found: dict[str, Any] = shares[workers - 1]
    return found


def environment(settings: dict[str, Any], options: argparse.Namespace, given: dict[str, Any]) -> dict[str, str]:
    """What a job finds in its environment beside the tenant's file.

    Raises:
        Refused: no such profile.
    """
    profiles = {**settings["profiles"], "deterministic": DETERMINISTIC}
    # The user of the jobs has no name in the image, and Python asks for one (getpass, torch's compiler).
    user = {"USER": options.tenant, "LOGNAME": options.tenant, "PS1": rf"{options.tenant}@job:\w\$ "}
    found = {"HOME": "/tmp", "PYTHONPATH": HOOK, "GPULAB_TENANT": options.tenant, **user}
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
    given = share(settings, options.tenant, 1 if options.workers is None else options.workers)
    uid, client = settings["uid"], settings["client"]
    words = ["docker", "run", "--rm", "--init", "--pull", "never", "--name", place(options.tenant), "--hostname", "job"]
    words += ["--add-host", "job:127.0.0.1", "--label", f"{TENANT}={options.tenant}"]
    words += ["--label", f"{NAME}={options.name}", "--label", f"{LIMIT}={limit_s:g}"]
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
    # A shell at a terminal does not end by SIGTERM.
    words += ["--interactive", "--tty", "--stop-signal", "SIGHUP"] if options.shell else []
    return [*words, settings["image"], *program(settings, options)]


def place(tenant: str) -> str:
    """The name of a tenant's only container: no job's own name can be that of another's, or of a service."""
    return f"gpulab-job-{tenant}"


def script(command: list[str]) -> list[str]:
    """What torchrun runs. `python` in front is what a user of one process types."""
    return command[1:] if command[0] in ("python", "python3") else command


def program(settings: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """What runs in the container. The image's own PATH stays behind the environment's programs.

    What a job makes can be changed by the tenant's people, too: they are its group.
    """
    if options.shell:
        # Its startup files would name a user that the image does not know.
        command = ["bash", "--norc"]
    elif options.workers:
        command = ["torchrun", "--standalone", f"--nproc-per-node={options.workers}", *script(options.command)]
        if settings["environment"]:
            command = [f"{ENVIRONMENT}/bin/python", "-m", "torch.distributed.run", *command[1:]]
    else:
        command = options.command
    path = f'PATH="{ENVIRONMENT}/bin:$PATH"; ' if settings["environment"] else ""
    return ["sh", "-c", f'umask 002; {path}exec "$@"', "sh", *command]


def inside(folder: str, path: str) -> str:
    """Where a folder of a tenant's lies in the container.

    Raises:
        Refused: it lies outside, or is none.
    """
    whole = os.path.realpath(os.path.join(folder, path))
    within(folder, whole, f"--workdir {path}: expected a folder")
    if not os.path.isdir(whole):
        raise Refused(f"--workdir {path}: there is no folder {whole}")
    return WORKSPACE + whole[len(os.path.realpath(folder)) :]


def within(folder: str, resolved: str, what: str) -> None:
    """Refuse a path, resolved, that is not the folder and not below it."""
    top = os.path.realpath(folder)
    if resolved != top and not resolved.startswith(f"{top}/"):
        raise Refused(f"{what} below {folder}")


class Log:
    """What a job says, with its start and its end. A disk that is full costs lines here, never the job."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.gap = file, False

    def write(self, data: bytes) -> None:
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            if not self.gap:
                say(f"the log has a gap: {error.strerror}; the job goes on")
            self.gap = True

    def note(self, text: str) -> None:
        self.write(f"gpulab-run: {datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n".encode())


def say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"gpulab-run: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def log_of(settings: dict[str, Any], options: argparse.Namespace) -> Iterator[Log]:
    """The job's log, appended to. A file of the tenant's is opened with the rights of its jobs, never with root's.

    Raises:
        Refused: it lies outside of the tenant's folder, or can't be written.
    """
    if options.log is None:
        path = f"{LOGS}/{options.tenant}/{options.name}.log"
        try:
            handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise Refused(f"the log {path}: {error.strerror}") from None
    else:
        handle = tenants_log(settings, options)
    with os.fdopen(handle, "ab", buffering=0) as file:
        yield Log(file)


def tenants_log(settings: dict[str, Any], options: argparse.Namespace) -> int:
    folder, what = settings["tenants"][options.tenant]["folder"], f"--log {options.log}: expected a file"
    path = os.path.normpath(os.path.join(folder, options.log))
    # Before it makes the file, and once more of the file that it has got: links change.
    within(folder, os.path.realpath(os.path.dirname(path)), what)
    uid, groups = settings["uid"], os.getgroups()
    try:
        os.setgroups([grp.getgrnam(f"gpulab-{options.tenant}").gr_gid])
        os.setegid(uid)
        os.seteuid(uid)
        # A pipe that nobody reads would keep it waiting.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(path, flags, 0o640)
    except OSError as error:
        raise Refused(f"--log {options.log}: {error.strerror}: {path}") from None
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
    try:
        within(folder, os.path.realpath(f"/proc/self/fd/{handle}"), what)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise Refused(f"--log {options.log}: {path} is no file")
    except Refused:
        os.close(handle)
        raise
    return handle


def engine(*words: str) -> str:
    """What the container engine answers.

    Raises:
        Refused: nothing, or an error.
    """
    try:
        done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False)
    except OSError as error:
        raise Refused(f"the container engine does not answer: docker: {error.strerror}") from None
    if done.returncode != 0:
        raise Refused(f"the container engine does not answer: {' '.join(done.stderr.split())}")
    return done.stdout


def jobs(tenant: str | None = None) -> list[dict[str, str]]:
    """Running jobs: `name`, `tenant`, `status`, `limit`."""
    form = "\t".join(["{{.Status}}", *(f'{{{{.Label "{label}"}}}}' for label in (NAME, TENANT, LIMIT))])
    chosen = [f"label={NAME}", *([f"label={TENANT}={tenant}"] if tenant else [])]
    listed = engine("ps", *(word for each in chosen for word in ("--filter", each)), "--format", form)
    return [
        dict(zip(("status", "name", "tenant", "limit"), line.split("\t"), strict=True)) for line in listed.splitlines()
    ]


def stop(tenant: str) -> bool:
    """End a tenant's job; False: there is none, or the engine does not answer."""
    words = ["docker", "stop", "-t", str(GRACE_S), place(tenant)]
    with contextlib.suppress(OSError):
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    return False


def ready(settings: dict[str, Any], tenant: str) -> int:
    """The group of a tenant's jobs, if all is there that they need.

    Raises:
        Refused: something is not.
    """
    if not os.path.ismount(settings["data"]):
        raise Refused(f"the data disk is not mounted at {settings['data']}, and jobs lie there")
    needed = [settings["tenants"][tenant]["folder"], f"{TENANTS}/{tenant}.env", f"{settings['hook']}/sitecustomize.py"]
    needed += [f"{settings['environment']}/bin/python"] if settings["environment"] else []
    absent = [path for path in needed if not os.path.lexists(path)]
    try:
        gid = grp.getgrnam(f"gpulab-{tenant}").gr_gid
    except KeyError:
        absent.append(f"group gpulab-{tenant}")
    try:
        engine("image", "inspect", "--format", "{{.Id}}", settings["image"])
    except Refused as error:
        if "no such image" not in str(error).lower():
            raise
        absent.append(f"image {settings['image']}")
    if absent:
        raise Refused(f"missing on this guest: {', '.join(absent)}; a deploy brings it back")
    return gid


@contextlib.contextmanager
def turn(options: argparse.Namespace) -> Iterator[None]:
    """One job of a tenant at a time, as its share is for one: those beyond wait, or are refused.

    The lock goes with its holder. A container that has outlived it is ended: nobody looks at its time any more.

    Raises:
        Refused: a job runs, and the caller would not wait.
    """
    busy = f"a job of {options.tenant} runs"
    try:
        os.makedirs(LOCKS, mode=0o700, exist_ok=True)
        lock = open(f"{LOCKS}/{options.tenant}.lock", "w")  # noqa: SIM115
    except OSError as error:
        raise Refused(f"{LOCKS}: {error.strerror}") from None
    with lock:
        said = False
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left = jobs(options.tenant)
                if not left:
                    # One that was made and never started would keep its name.
                    subprocess.run(["docker", "rm", "--force", place(options.tenant)], capture_output=True, check=False)
                    break
                if not options.no_wait:
                    say(f"ending {left[0]['name']}, whose gpulab-run is gone")
                    stop(options.tenant)
                    continue
            if options.no_wait:
                raise Refused(f"{busy} already (gpulab-run --list)")
            if not said:
                say(f"waiting: {busy} (gpulab-run --list)")
                said = True
            time.sleep(1)
        yield


def run(settings: dict[str, Any], options: argparse.Namespace, user: str) -> int:
    """Run the job; returns its exit status."""
    longest = settings["time_limit_h"] * 3600
    limit_s = options.time_limit or longest
    if limit_s > longest:
        raise Refused(f"--time-limit: expected at most {settings['time_limit_h']:g}h, got {limit_s:g}s")
    if options.shell and (options.command or options.workers is not None):
        raise Refused("--shell: expected no command and no --workers beside it")
    if options.shell and not sys.stdin.isatty():
        raise Refused("--shell: expected a terminal")
    if not options.shell and not options.command:
        raise Refused("expected a command after --, or --shell")
    if (
        options.workers is not None
        and (first := (script(options.command) or [""])[0]) != "-m"
        and first[:1] in ("", "-")
    ):
        raise Refused(f"--workers: expected a script, or -m and a module, got {first or 'none'}")
    words = container(settings, options, limit_s, ready(settings, options.tenant))
    with contextlib.ExitStack() as held:
        # One that can't be had is said before a wait; ours is made after it, for jobs that run alone.
        log = held.enter_context(log_of(settings, options)) if options.log is not None else None
        held.enter_context(turn(options))
        log = log or held.enter_context(log_of(settings, options))
        stand_in = f" simulated ({settings['simulated']})" if settings["simulated"] else ""
        log.note(f"start {options.name} tenant={options.tenant} user={user} limit={limit_s:g}s{stand_in}")
        status = Job(words, options, limit_s, log).run()
        log.note(f"end {options.name} exit={status}" + (" (time limit)" if status == TIMED_OUT else "") + stand_in)
    return status


class Job:
    """A container from its start to its end, which comes of itself, by the clock or by a signal of ours."""

    def __init__(self, words: list[str], options: argparse.Namespace, limit_s: float, log: Log) -> None:
        self.words, self.options, self.limit_s, self.log = words, options, limit_s, log
        #: Signals; a queue, as a handler may not wait for a lock.
        self.told: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.late, self.ending, self.over = threading.Event(), threading.Event(), threading.Event()

    def run(self) -> int:
        """Its exit status."""
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            # nohup(1) and the background of a script ignore what is none of the job's business.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.tell)
        watcher = threading.Thread(target=self.watch, daemon=True)
        watcher.start()
        try:
            status, end = self.relay(self.words)
            lost = status == ENGINE_FAILED and (b"docker: " in end or b"waiting for container" in end)
            while self.still_runs():
                lost = False
                self.remark("the engine was away, and the job goes on; what it said meanwhile may be lost")
                words = ["docker", "attach", *([] if self.options.shell else ["--no-stdin"])]
                status, _ = self.relay([*words, place(self.options.tenant)])
            if lost:
                self.remark("the container engine did not start the job, or has lost it; a deploy mends the guest")
            elif status == KILLED and not self.ending.is_set():
                self.remark("the job was killed: by hand, or for want of main memory")
        finally:
            self.over.set()
            self.told.put(0)
            watcher.join()
        # A client that was killed has the signal below zero.
        return TIMED_OUT if self.late.is_set() else status if status >= 0 else 128 - status

    def tell(self, number: int, _: object) -> None:
        # The keys of a shell's terminal are the shell's.
        if number != signal.SIGINT or not self.options.shell:
            self.told.put(number)

    def watch(self) -> None:
        """End the container when its time is over or a signal has come."""
        try:
            number = self.told.get(timeout=self.limit_s)
            why = signal.Signals(number).name if number else ""
        except queue.Empty:
            self.late.set()
            why = "time limit"
        if why:
            self.ending.set()
            say(f"{why}: {self.options.name} is told to end, and killed after {GRACE_S} s")
        # The engine may not have made it yet, or be away.
        while not self.over.is_set() and not stop(self.options.tenant):
            self.over.wait(1)

    def relay(self, words: list[str]) -> tuple[int, bytes]:
        """Run a client of the engine and pass on what it says; its exit status and the end of what it said."""
        # In a session of its own, as a Ctrl-C is for us to pass on. It asks the job to end should we be killed.
        words = ["setpriv", "--pdeathsig", "TERM", "--", *words]
        shell = self.options.shell
        piped = {} if shell else {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        end = b""
        with subprocess.Popen(words, start_new_session=not shell, **piped) as process:  # type: ignore[call-overload]
            while process.stdout is not None and (chunk := os.read(process.stdout.fileno(), 65536)):
                end = (end + chunk)[-4096:]
                self.log.write(chunk)
                # Whoever looked may be gone, or their disk full.
                with contextlib.suppress(OSError):
                    while chunk:
                        chunk = chunk[os.write(1, chunk) :]
            return process.wait(), end

    def still_runs(self) -> bool:
        """Has it outlived its client? Waits for an engine that is away, unless the job is to end."""
        said = False
        while True:
            try:
                if not jobs(self.options.tenant):
                    return False
                # The engine lists one for a moment after its end.
                time.sleep(1)
                return bool(jobs(self.options.tenant))
            except Refused as error:
                if self.ending.is_set():
                    say(f"{error}; {self.options.name} may run on, and the next job of {self.options.tenant} ends it")
                    return False
                if not said:
                    self.remark(f"{error}; waiting for it")
                    said = True
                time.sleep(1)

    def remark(self, text: str) -> None:
        say(text)
        self.log.note(text)


def chosen_jobs(user: str, options: argparse.Namespace) -> list[dict[str, str]]:
    """Those of `--tenant` that are the caller's."""
    return [job for job in jobs(options.tenant) if may_use(user, job["tenant"])]


def end_job(user: str, options: argparse.Namespace) -> int:
    found = [job["tenant"] for job in chosen_jobs(user, options) if job["name"] == options.stop]
    if not found:
        raise Refused(f"--stop {options.stop}: no such job of yours runs (gpulab-run --list)")
    if len(found) > 1:
        raise Refused(f"--stop {options.stop}: {' and '.join(found)} have one: expected --tenant beside it")
    if not stop(found[0]) and any(job["name"] == options.stop for job in jobs(found[0])):
        raise Refused(f"--stop {options.stop}: the engine could not end it")
    return 0


def settings_of_guest() -> dict[str, Any]:
    """What a deploy has written.

    Raises:
        Refused: nothing, or it can't be read.
    """
    try:
        with open(SETTINGS) as file:
            found: dict[str, Any] = json.load(file)
    except FileNotFoundError:
        raise Refused(f"{SETTINGS} is missing: this guest runs no PyTorch jobs") from None
    except (OSError, ValueError) as error:
        raise Refused(f"{SETTINGS}: {error}; a deploy of this guest writes it anew") from None
    return found


def asked(words: list[str]) -> int:
    """Do what a command line asks for; the exit status.

    Raises:
        Refused: it can't be.
    """
    options, unknown = parser().parse_known_args(words)
    if unknown:
        raise Refused(f"{unknown[0]} is no option of gpulab-run; the command with its own stands after --")
    user, settings = caller(), settings_of_guest()
    declared = settings["tenants"]
    if options.tenant is not None and options.tenant not in declared:
        raise Refused(f"--tenant {options.tenant}: expected one of {', '.join(sorted(declared))}")
    if options.list:
        found = chosen_jobs(user, options)
        if not found:
            say("no job runs")
        for job in found:
            print(f"{job['name']}\t{job['tenant']}\t{job['status']}\tlimit {job['limit']}s")
        return 0
    if options.stop is not None:
        return end_job(user, options)
    if options.tenant is None:
        raise Refused(f"expected --tenant: one of {', '.join(sorted(declared))}")
    if not may_use(user, options.tenant):
        raise Refused(
            f"{user} is not in the group gpulab-{options.tenant} "
            f"(an admin: usermod --append --groups gpulab-{options.tenant} {user})"
        )
    if options.name is None:
        options.name = f"job-{options.tenant}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,99}", options.name):
        raise Refused(f"--name {options.name!r}: expected letters, digits, dots, hyphens and underscores")
    return run(settings, options, user)


def main() -> int:
    try:
        return asked(sys.argv[1:])
    except Refused as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:
        # Before there was a job: it waited for its turn.
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
