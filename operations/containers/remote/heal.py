# SPDX-License-Identifier: MIT
"""gpulab-heal: does each service answer and use the GPU? If not, it is restarted, with a note of what was seen.

    gpulab-heal                a look at all of them, as gpulab-heal.timer has it
    gpulab-heal --status       what the last look saw, the last notes, and the alarms
    gpulab-heal --reset NAME   take an alarm back: the service (or `gpu`) is looked after again

It touches nothing that is not gpulab's, that somebody stopped by hand, or that a deploy is replacing; nothing while
the data disk is away or the guest itself has lost its GPU, where a restart can't help. After so many restarts within
an hour it stops, raises the alarm and leaves the service to a person.
"""

import argparse
import glob
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from operations.remote.common import CONTAINERS_LOCK, locked, run, text

CONFIGURATION = "/etc/gpulab/heal.json"
FOLDER = "/var/lib/gpulab/heal"
LABEL = "org.gpulab.service"
UNIT = "gpulab-heal.service"
#: Where Quadlet's file of a service lies, which a deploy writes anew.
QUADLET = "/etc/containers/systemd"
CDI_FOLDERS = ("/etc/cdi", "/var/run/cdi")
CDI_KIND = "nvidia.com/gpu"

#: Name of the alarm that is about no service but the guest's GPU.
GPU = "gpu"
#: Notes that are kept; the file is shortened when it holds twice as many.
NOTES = 200
#: Looks in a row that must see the same kind of trouble before something is done about it.
TWICE = 2
#: Seconds for a service to answer.
ANSWER_S = 10

#: Priorities of the journal (sd-daemon(3)).
ALERT, WARNING, NOTICE = 1, 4, 5


@dataclass(frozen=True)
class Trouble:
    """Why a service is not well. `looks`: how many in a row must see it before a restart."""

    what: str
    looks: int = 1


@dataclass(frozen=True)
class Verdict:
    """What one look makes of a service: `do` is `nothing`, `wait` (it is not known yet to be well), `restart` or
    `alarm`; `words` are for people.
    """

    do: str
    words: str


def judge(service: Mapping[str, Any], memory: Mapping[str, Any], now: float, policy: Mapping[str, Any]) -> Verdict:
    """Decide over one service.

    + service: what `look_at` has read
    + memory: what is known of it from earlier looks: `bad` looks in a row, times of `restarts`, `held` (the start of
      the container that was seen with memory of the card)
    + policy: `failures`, `window_s` and `grace_s`
    """
    if service["spared"]:
        return Verdict("nothing", str(service["spared"]))
    if starting(service, now, policy):
        return Verdict("wait", f"started {now - service['started']:.0f} s ago, has {policy['grace_s']} s")
    trouble = troubled(service, memory)
    if trouble is None:
        return Verdict("nothing", f"well{': ' + service['use'] if service['use'] else ''}")
    if memory.get("bad", 0) + 1 < trouble.looks:
        return Verdict("wait", f"{trouble.what} (seen once; the next look decides)")
    recent = [each for each in memory.get("restarts", []) if now - each < policy["window_s"]]
    if len(recent) >= policy["failures"]:
        window = f"{policy['window_s'] / 60:.0f} min"
        return Verdict("alarm", f"{trouble.what}; restarted {len(recent)} times within {window}, which did not help")
    return Verdict("restart", trouble.what)


def starting(service: Mapping[str, Any], now: float, policy: Mapping[str, Any]) -> bool:
    """Does it still have time to get ready?"""
    return bool(service["running"] and service["started"] and now - service["started"] < policy["grace_s"])


def troubled(service: Mapping[str, Any], memory: Mapping[str, Any]) -> Trouble | None:
    """What is wrong with a service that is to run; None: nothing."""
    if not service["running"]:
        # One that the engine starts again and again may be up at the next look.
        looks = TWICE if service["status"].startswith("restarting") else 1
        return Trouble(f"it is {service['status']}" + (f": {service['error']}" if service["error"] else ""), looks)
    if service["inside"]:
        return Trouble(f"its container has lost the GPU: {service['inside']}")
    if service["unhealthy"]:
        return Trouble("its health check fails", TWICE)
    if service["silent"]:
        return Trouble(f"it does not answer: {service['silent']}", TWICE)
    if service["on_cpu"]:
        return Trouble(f"it computes on the CPU: {service['on_cpu']} in memory with nothing on the GPU", TWICE)
    held = memory.get("held")
    if service["shows"] == "memory" and held and held == service["started"] and not service["holds_mib"]:
        return Trouble("its processes hold none of the card's memory any more", TWICE)
    return None


# What is seen.


def look_at(name: str, declared: Mapping[str, Any], container: Mapping[str, Any], users: Mapping[str, int]) -> Any:
    """A service as it is now.

    + container: what the engine says of its container, as `docker_state` and `podman_state` have it
    + users: MiB of the card that the processes of each container hold, by the container's id
    """
    found: dict[str, Any] = {
        **container,
        "shows": declared["shows"],
        "inside": "",
        "silent": "",
        "on_cpu": "",
        "use": "",
        "holds_mib": users.get(container["id"], 0),
    }
    if found["spared"] or not found["running"]:
        return found
    if declared["shows"]:
        status, output, error = run(container["engine"], "exec", name, "nvidia-smi", "-L", timeout=30)
        if status != 0 or "GPU " not in output:
            found["inside"] = " ".join((output + error).split())[:200] or f"nvidia-smi ends with status {status}"
            return found
    found["silent"], _ = ask(declared["probe"]) if declared["probe"] else ("", None)
    if not found["silent"] and declared["shows"] == "ps":
        found["silent"], loaded = ask(declared["ps"])
        found["on_cpu"], found["use"] = on_cpu(loaded)
    elif found["holds_mib"]:
        found["use"] = f"{found['holds_mib']} MiB of the card"
    return found


def on_cpu(answer: Any) -> tuple[str, str]:
    """Of Ollama's /api/ps: models in memory without a byte on the GPU, and what there is to say otherwise."""
    models = (answer.get("models") or []) if isinstance(answer, dict) else []
    away = [str(each.get("name")) for each in models if not each.get("size_vram")]
    mib = sum(int(each.get("size_vram") or 0) for each in models) // 2**20
    return ", ".join(away), f"{mib} MiB of the card" if models else "no model in memory"


def ask(url: str) -> tuple[str, Any]:
    """Why a URL of this guest's does not answer 200 (empty: it does), and its JSON."""
    # A proxy of the environment has nothing to say here.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=ANSWER_S) as response:
            content = response.read()
    except urllib.error.HTTPError as error:
        return f"{url}: HTTP {error.code}", None
    except (OSError, http.client.HTTPException) as error:
        return f"{url}: {error}", None
    try:
        return "", json.loads(content)
    except ValueError:
        return "", None


def docker_state(name: str) -> dict[str, Any]:
    """A service's container in Docker. `spared`: why it is to be left alone, empty: it is not."""
    status, output, error = run("docker", "inspect", "--type", "container", name)
    found: dict[str, Any] = {"engine": "docker", "id": "", "running": False, "status": "absent", "error": ""}
    found |= {"started": None, "unhealthy": False, "identity": "", "spared": ""}
    if status != 0:
        absent = "No such" in error
        found["spared"] = f"there is no container {name}: a deploy makes it" if absent else f"Docker: {error.strip()}"
        return found
    item = json.loads(output)[0]
    state, labels = item["State"], item["Config"].get("Labels") or {}
    found |= {
        "id": item["Id"],
        "identity": item["Id"],
        "running": state["Status"] == "running",
        "status": f"{state['Status']} (exit status {state['ExitCode']})",
        "error": state.get("Error") or "",
        "started": seconds(state.get("StartedAt")),
        "unhealthy": (state.get("Health") or {}).get("Status") == "unhealthy",
    }
    policy = (item["HostConfig"].get("RestartPolicy") or {}).get("Name") or "no"
    if labels.get(LABEL) != name:
        found["spared"] = f"container {name} is not gpulab's"
    elif state["Status"] == "paused":
        found["spared"] = "paused by hand"
    elif state["Status"] == "created":
        found["spared"] = "created, and never started: a deploy is at it, or was killed there"
    elif by_hand(state, policy, booted()):
        found["spared"] = "stopped by hand: `docker start` or a deploy starts it again"
    return found


def by_hand(state: Mapping[str, Any], policy: str, boot: float) -> bool:
    """Was a container that has ended stopped by somebody?

    The engine does not tell. It starts a container of `unless-stopped` again whatever it ended with, unless somebody
    stopped it, or it could not be started at all (then there is an error); one that ended before the boot was stopped
    by that.
    """
    ended = seconds(state.get("FinishedAt"))
    if state["Status"] != "exited" or state.get("Error") or state.get("OOMKilled") or ended is None or ended < boot:
        return False
    return policy in ("unless-stopped", "always") or state["ExitCode"] in (0, 143)


def podman_state(name: str) -> dict[str, Any]:
    """A service's unit, which Quadlet has made, and its container in Podman."""
    keys = "LoadState,ActiveState,Result,ActiveEnterTimestampMonotonic"
    shown = run("systemctl", "show", "-p", keys, f"{name}.service")[1].splitlines()
    unit = dict(line.partition("=")[::2] for line in shown)
    found: dict[str, Any] = {"engine": "podman", "id": "", "running": False, "error": "", "started": None}
    found |= {"unhealthy": False, "identity": changed(f"{QUADLET}/{name}.container"), "spared": ""}
    found["status"] = f"{unit.get('ActiveState', '')} ({unit.get('Result', '')})"
    if not found["identity"] or unit.get("LoadState") != "loaded":
        found["spared"] = f"there is no unit {name}.service of {QUADLET}/{name}.container: a deploy makes it"
    elif unit.get("ActiveState") in ("activating", "deactivating", "reloading"):
        found["spared"] = f"its unit is {unit['ActiveState']}"
    elif unit.get("ActiveState") == "inactive" and unit.get("ActiveEnterTimestampMonotonic", "0") not in ("", "0"):
        found["spared"] = f"stopped by hand: `systemctl start {name}` or a deploy starts it again"
    status, output, _ = run("podman", "inspect", "--type", "container", name)
    if status != 0 or found["spared"]:
        return found
    item = json.loads(output)[0]
    state, labels = item["State"], item["Config"].get("Labels") or {}
    if labels.get(LABEL) != name:
        return {**found, "spared": f"container {name} is not gpulab's"}
    return found | {
        "id": item["Id"],
        "running": bool(state["Running"]) and unit.get("ActiveState") == "active",
        "started": seconds(state.get("StartedAt")),
        "unhealthy": (state.get("Health") or {}).get("Status") == "unhealthy",
    }


def changed(path: str) -> str:
    """What is another one after a file was written anew; empty: no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_ino}.{status.st_mtime_ns}"


def seconds(stamp: str | None) -> float | None:
    """The engine's time (RFC 3339, nanoseconds) in seconds since the epoch; None: never."""
    match = re.fullmatch(r"(\d{4})(-\d\d-\d\d[T ]\d\d:\d\d:\d\d)(\.\d+)?\s*(Z|[+-]\d\d:?\d\d)( .*)?", stamp or "")
    if match is None or match[1] == "0001":
        return None
    zone = "+00:00" if match[4] == "Z" else match[4]
    return datetime.fromisoformat(f"{match[1]}{match[2].replace(' ', 'T')}{(match[3] or '')[:7]}{zone}").timestamp()


def booted() -> float:
    """When this guest's first process was started; the kernel's own boot is that of the machine around a container."""
    btime = next((line.split()[1] for line in (text("/proc/stat") or "").splitlines() if line.startswith("btime")), "0")
    fields = (text("/proc/1/stat") or "").rpartition(")")[2].split()
    return float(btime) + (int(fields[19]) / os.sysconf("SC_CLK_TCK") if len(fields) > 19 else 0.0)


def card_users() -> dict[str, int]:
    """MiB of the card that each container's processes hold, by the container's id."""
    words = ("--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
    found: dict[str, int] = {}
    for line in run("nvidia-smi", *words, timeout=30)[1].splitlines():
        pid, _, used = line.partition(",")
        match = re.search(r"[0-9a-f]{64}", text(f"/proc/{pid.strip()}/cgroup") or "")
        if match is not None:
            # What NVML does not tell in numbers is still more than nothing.
            mib = int(used) if used.strip().isdigit() else 1
            found[match[0]] = found.get(match[0], 0) + mib
    return found


def guest_lost_gpu() -> str:
    """Why no service can have the GPU, empty when the guest itself has it."""
    status, output, error = run("nvidia-smi", "-L", timeout=30)
    if status != 0 or "GPU " not in output:
        said = " ".join((output + error).split())[:200] or f"status {status}"
        return f"nvidia-smi in the guest says: {said}"
    specifications = [path for folder in CDI_FOLDERS for path in glob.glob(f"{folder}/*")]
    if not any(CDI_KIND in (text(path) or "") for path in specifications):
        return f"no CDI specification of {CDI_KIND}: a container that is restarted would not start; deploy again"
    return ""


# What is kept and told.


def load(name: str) -> dict[str, Any]:
    try:
        found = json.loads(text(f"{FOLDER}/{name}") or "{}")
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def keep(name: str, value: Any) -> None:
    """Whole or not at all."""
    os.makedirs(FOLDER, exist_ok=True)
    with open(f"{FOLDER}/{name}.new", "w") as file:
        json.dump(value, file)
    os.rename(f"{FOLDER}/{name}.new", f"{FOLDER}/{name}")


def note(service: str, seen: str, done: str) -> None:
    """Add a line to the notes, of which the last `NOTES` are kept for sure."""
    os.makedirs(FOLDER, exist_ok=True)
    path = f"{FOLDER}/notes.jsonl"
    line = {"time": stamp(time.time()), "service": service, "seen": seen, "done": done}
    lines = [*(text(path) or "").splitlines(), json.dumps(line)]
    with open(f"{path}.new", "w") as file:
        file.write("".join(f"{each}\n" for each in (lines if len(lines) <= 2 * NOTES else lines[-NOTES:])))
    os.rename(f"{path}.new", path)


def stamp(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(when))


def say(priority: int, words: str) -> None:
    """A line of the journal, with its priority where one reads it."""
    print(f"<{priority}>{words}" if "JOURNAL_STREAM" in os.environ else words, flush=True)


def alarm_file(name: str) -> str:
    return f"{FOLDER}/alarm/{name}"


def alarms() -> dict[str, str]:
    """Name of each alarm that stands, and why it was raised."""
    names = sorted(os.listdir(f"{FOLDER}/alarm")) if os.path.isdir(f"{FOLDER}/alarm") else []
    return {name: (text(alarm_file(name)) or "").strip() for name in names}


def raise_alarm(name: str, words: str, done: str) -> None:
    os.makedirs(f"{FOLDER}/alarm", exist_ok=True)
    with open(alarm_file(name), "w") as file:
        file.write(f"{stamp(time.time())} {words}\n")
    note(name, words, done)
    say(ALERT, f"ALARM {name}: {words}; {done}")


def clear_alarm(name: str, why: str) -> None:
    os.unlink(alarm_file(name))
    note(name, why, "alarm taken back")
    say(NOTICE, f"{name}: alarm taken back: {why}")


# What is done.


def restart(name: str, engine: str) -> str:
    """Restart a service; what came of it. A container keeps the time to end that it was declared with."""
    if engine == "podman":
        words = ("systemctl", "restart", f"{name}.service")
        run("systemctl", "reset-failed", f"{name}.service")
    else:
        words = ("docker", "restart", name)
    status, output, error = run(*words, timeout=300)
    if status == 0:
        return "restarted"
    said = " ".join((error or output).split())[:300]
    gone = " (its devices are gone: deploy again)" if "CDI" in said or "device" in said else ""
    return f"`{' '.join(words)}` failed: {said}{gone}"


Look = Callable[[str, Mapping[str, Any], Mapping[str, int]], dict[str, Any]]


def look_now(configuration: Mapping[str, Any]) -> Look:
    state = podman_state if configuration["engine"] == "podman" else docker_state
    return lambda name, declared, users: look_at(name, declared, state(name), users)


def look(configuration: Mapping[str, Any], now: float, see: Look) -> dict[str, str]:
    """One look at all services: what there is to say of each."""
    memory = load("state.json")
    if not os.path.ismount(configuration["data"]):
        return dict.fromkeys(configuration["services"], f"nothing is mounted at {configuration['data']}: left alone")
    if configuration["gpu"]:
        lost = guest_lost_gpu()
        watch_the_gpu(memory, lost)
        if lost:
            keep("state.json", memory)
            return dict.fromkeys(configuration["services"], f"left alone: {lost}")
    users, said = card_users() if configuration["gpu"] else {}, {}
    for name, declared in configuration["services"].items():
        known = memory.setdefault(name, {})
        service = see(name, declared, users)
        said[name] = attend(name, service, known, now, configuration)
        keep("state.json", memory)
    return said


def watch_the_gpu(memory: dict[str, Any], lost: str) -> None:
    """The alarm of the guest's own GPU. It is taken back by itself: nobody waits for a person to say so."""
    memory["gpu_bad"] = memory.get("gpu_bad", 0) + 1 if lost else 0
    raised = GPU in alarms()
    # A driver that a deploy loads anew is away for a moment.
    if lost and memory["gpu_bad"] >= TWICE and not raised:
        raise_alarm(GPU, f"the guest's GPU: {lost}", "no service is restarted: that can't help")
    if not lost and raised:
        clear_alarm(GPU, "the guest has its GPU again")


def attend(
    name: str, service: Mapping[str, Any], known: dict[str, Any], now: float, configuration: Mapping[str, Any]
) -> str:
    """Look after one service; what there is to say of it."""
    if service["identity"] and known.get("identity") != service["identity"]:
        # Another container: what the one before went through is no matter of its own.
        if name in alarms():
            clear_alarm(name, "its container is a new one")
        known.clear()
        known["identity"] = service["identity"]
    if name in alarms():
        return f"ALARM since {alarms()[name]}; `gpulab-heal --reset {name}` when it is mended"
    verdict = judge(service, known, now, configuration)
    if service["holds_mib"]:
        known["held"] = service["started"]
    # A service that is still starting says nothing for or against the look before.
    known["bad"] = known.get("bad", 0) + (not starting(service, now, configuration)) if verdict.do == "wait" else 0
    if verdict.do in ("nothing", "wait"):
        return verdict.words
    if verdict.do == "alarm":
        raise_alarm(name, verdict.words, "not restarted any more")
        return f"ALARM: {verdict.words}"
    known["restarts"] = [each for each in known.get("restarts", []) if now - each < configuration["window_s"]] + [now]
    done = restart(name, service["engine"])
    count = f"{len(known['restarts'])} of {configuration['failures']} within {configuration['window_s'] / 60:.0f} min"
    note(name, verdict.words, f"{done} ({count})")
    say(WARNING, f"{name}: {verdict.words}; {done} ({count})")
    return f"{verdict.words}; {done}"


def main_look() -> int:
    """One look, alone: never beside a deploy that is replacing a container. 1: an alarm stands."""
    configuration = json.loads(text(CONFIGURATION) or "null")
    if configuration is None:
        print(f"{CONFIGURATION} is missing: deploy again", file=sys.stderr)
        return 1
    with locked(CONTAINERS_LOCK, wait=False) as ours:
        if not ours:
            say(NOTICE, "a deploy is at work: no look now")
            said = dict.fromkeys(configuration["services"], "left alone: a deploy is at work")
        else:
            for name in alarms().keys() - {GPU, *configuration["services"]}:
                clear_alarm(name, "the service is no longer declared")
            said = look(configuration, time.time(), look_now(configuration))
    keep("look.json", {"time": time.time(), "services": said})
    return 1 if alarms() else 0


def reset(name: str) -> int:
    configuration = json.loads(text(CONFIGURATION) or "null") or {"services": {}}
    if name != GPU and name not in configuration["services"]:
        known = ", ".join([*configuration["services"], GPU])
        print(f"{name}: no such service; expected one of {known}", file=sys.stderr)
        return 2
    with locked(CONTAINERS_LOCK):
        memory = load("state.json")
        memory["gpu_bad" if name == GPU else name] = 0 if name == GPU else {}
        keep("state.json", memory)
        if name in alarms():
            clear_alarm(name, "by hand")
    if not alarms():
        run("systemctl", "reset-failed", UNIT)
    print(f"{name} is looked after again")
    return 0


def status() -> int:
    """Tell what there is to tell; 1: an alarm stands."""
    last = load("look.json")
    if not last:
        print("no look yet")
    else:
        print(f"last look {stamp(last['time'])}, {time.time() - last['time']:.0f} s ago")
        for name, words in last["services"].items():
            print(f"  {name}: {words}")
    for line in list(lines_of_notes())[-10:]:
        print(f"note {line['time']} {line['service']}: {line['seen']}; {line['done']}")
    for name, words in alarms().items():
        print(f"ALARM {name}: {words}; `gpulab-heal --reset {name}` when it is mended")
    return 1 if alarms() else 0


def lines_of_notes() -> Iterable[dict[str, Any]]:
    for line in (text(f"{FOLDER}/notes.jsonl") or "").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            # A disk that was full cut it off.
            continue


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpulab-heal",
        description="Look at gpulab's services once, and restart those that have lost the GPU or do not answer.",
    )
    acts = parser.add_mutually_exclusive_group()
    acts.add_argument("--status", action="store_true", help="what the last look saw, notes, alarms")
    acts.add_argument("--reset", metavar="NAME", help="take an alarm back: the service, or gpu, is looked after again")
    given = parser.parse_args()
    if given.status:
        return status()
    return reset(given.reset) if given.reset else main_look()


if __name__ == "__main__":
    sys.exit(main())
