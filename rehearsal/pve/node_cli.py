#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""A rehearsal node's own commands (simulated): thin clients of its API, as root@pam.

pveum, pvesm, qm, qmrestore, vzdump, pvesh and pvenode.

Installed on the node under each of those names. Standard library only. Output on stdout has PVE's form; that all this
is simulated is said on stderr of a terminal and by --help.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NoReturn

SETTINGS = "/etc/lab-front.json"
POLL_S = 0.1
# `qm guest exec --pass-stdin` takes so many bytes.
STDIN_MAX = 1024**2
# Options that take no value: PVE's booleans may stand alone.
FLAGS = frozenset(
    [
        *("purge", "skiplock", "force", "append", "privsep", "propagate", "destroy-unreferenced-disks"),
        *("overrule-shutdown", "forceStop", "force-stop", "current"),
        *("unique", "start", "protected", "remove", "enabled", "all", "pass-stdin", "synchronous"),
    ]
)
Options = dict[str, "list[str]"]


class Failed(Exception):
    """The API refused; the text is what PVE prints."""


def main(argv: list[str]) -> int:
    tool = os.path.basename(argv[0])
    if sys.stderr.isatty():
        print(f"{tool}: simulated (rehearsal lab)", file=sys.stderr)
    words, options = parse(argv[1:])
    run = TOOLS.get(tool)
    if run is None or (not words and tool != "vzdump"):
        print(f"usage: {tool} COMMAND [ARGS] [OPTIONS]   (simulated, rehearsal lab)", file=sys.stderr)
        return 255
    output_format = options.pop("output-format", ["text"])[-1]
    try:
        result = run(words, options)
    except Failed as error:
        print(error, file=sys.stderr)
        return 255
    show(result, output_format)
    return 0


def parse(argv: list[str]) -> tuple[list[str], Options]:
    """(words, options): `--key value`, `-key value`, `--key=value`; what follows `--` are words."""
    words: list[str] = []
    options: Options = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            words += rest
            break
        if not word.startswith("-") or word == "-":
            words.append(word)
            continue
        key, equals, value = word.lstrip("-").partition("=")
        if not equals:
            alone = not rest or rest[0].startswith("-") or (key in FLAGS and rest[0] not in ("0", "1"))
            value = "1" if alone and (key in FLAGS or not rest) else rest.pop(0)
        options.setdefault(key, []).append(value)
    return words, options


def call(method: str, path: str, options: Options | None = None) -> Any:
    """One request to the front; the answer's data."""
    with open(SETTINGS) as file:
        settings = json.load(file)
    pairs = [(key, value) for key, values in (options or {}).items() for value in values]
    encoded = urllib.parse.urlencode(pairs)
    url = settings["url"] + "/api2/json" + urllib.parse.quote(path, safe="/:@!,")
    body = None
    if method in ("GET", "DELETE"):
        url += "?" + encoded if encoded else ""
    else:
        body = encoded.encode()
    request = urllib.request.Request(url, body, {"Authorization": "LabRoot " + settings["secret"]}, method=method)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=settings["ca"])),
    )
    try:
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise Failed(refusal(error)) from None
    except OSError as error:
        raise Failed(f"ipcc_send_rec failed: {getattr(error, 'reason', error)}") from None


def refusal(error: urllib.error.HTTPError) -> str:
    """PVE's command lines print one line for each parameter, or the message."""
    try:
        answer = json.load(error)
    except ValueError:
        return str(error.reason)
    if not answer.get("errors"):
        return str(answer["message"]).strip()
    lines = ["400 Parameter verification failed."]
    return "\n".join(lines + [f"{key}: {text.strip()}" for key, text in answer["errors"].items()])


def wait(upid: str) -> str:
    """Wait for a worker and return its UPID; Failed with its exit status."""
    path = f"/nodes/{node()}/tasks/{upid}"
    while True:
        status = call("GET", path + "/status")
        if status["status"] == "stopped":
            break
        time.sleep(POLL_S)
    if status["exitstatus"] != "OK":
        raise Failed(status["exitstatus"])
    return upid


def node() -> str:
    with open(SETTINGS) as file:
        return str(json.load(file)["node"])


def show(result: Any, output_format: str) -> None:
    if result is None:
        return
    if output_format in ("json", "json-pretty"):
        print(json.dumps(result, indent=2 if output_format == "json-pretty" else None, sort_keys=True))
    elif isinstance(result, str):
        print(result)
    elif isinstance(result, dict):
        for key, value in sorted(result.items()):
            print(f"{key}: {value if isinstance(value, (str, int, float)) else json.dumps(value)}")
    else:
        for entry in result:
            print("  ".join(str(value) for value in entry.values()) if isinstance(entry, dict) else entry)


def usage(tool: str, words: list[str]) -> NoReturn:
    raise Failed(f"ERROR: unknown command '{tool} {' '.join(words)}' (simulated)")


def need(words: list[str], count: int, tool: str) -> None:
    if len(words) < count:
        raise Failed(f"400 not enough arguments\n{tool} {' '.join(words)} (simulated)")


def pveum(words: list[str], options: Options) -> Any:
    short = {"useradd": "user add", "roleadd": "role add", "aclmod": "acl modify", "rolemod": "role modify"}
    words = short.get(words[0], words[0]).split() + words[1:]
    what, verb = words[0], words[1] if len(words) > 1 else "list"
    if what == "user" and verb == "token":
        return pveum_token(words[2:], options)
    rest = words[2:]
    if what == "acl":
        if verb == "list":
            return call("GET", "/access/acl")
        need(rest, 1, "pveum acl")
        gone = {"delete": ["1"]} if verb == "delete" else {}
        return call("PUT", "/access/acl", {"path": [rest[0]], **options, **gone})
    if what == "user" and verb == "permissions":
        return call("GET", "/access/permissions", {"userid": rest[:1] or ["root@pam"], **options})
    kinds = {"role": ("roles", "roleid"), "user": ("users", "userid")}
    if what not in kinds:
        usage("pveum", words)
    plural, key = kinds[what]
    if verb == "list":
        return call("GET", f"/access/{plural}")
    need(rest, 1, f"pveum {what}")
    if verb == "add":
        return call("POST", f"/access/{plural}", {key: [rest[0]], **options})
    if verb in ("modify", "delete"):
        method = "PUT" if verb == "modify" else "DELETE"
        return call(method, f"/access/{plural}/{rest[0]}", options)
    usage("pveum", words)


def pveum_token(words: list[str], options: Options) -> Any:
    need(words, 2, "pveum user token")
    verb, user = words[0], words[1]
    base = f"/access/users/{user}/token"
    if verb == "list":
        return call("GET", base)
    need(words, 3, "pveum user token")
    if verb == "permissions":
        return call("GET", "/access/permissions", {"userid": [f"{user}!{words[2]}"], **options})
    methods = {"add": "POST", "modify": "PUT", "remove": "DELETE", "delete": "DELETE"}
    if verb not in methods:
        usage("pveum", ["user", "token", *words])
    return call(methods[verb], f"{base}/{words[2]}", options)


def pvesm(words: list[str], options: Options) -> Any:
    if words[0] == "status":
        return call("GET", f"/nodes/{node()}/storage", options)
    need(words, 2, "pvesm")
    if words[0] == "set":
        call("PUT", f"/storage/{words[1]}", options)
        return None
    if words[0] == "list":
        return call("GET", f"/nodes/{node()}/storage/{words[1]}/content", options)
    if words[0] == "free":
        storage = words[1].partition(":")[0]
        wait(call("DELETE", f"/nodes/{node()}/storage/{storage}/content/{words[1]}"))
        return f"Removed volume '{words[1]}'"
    usage("pvesm", words)


def qm(words: list[str], options: Options) -> Any:
    base = f"/nodes/{node()}/qemu"
    verb = words[0]
    if verb == "list":
        return call("GET", base)
    need(words, 2, "qm")
    one = f"{base}/{words[1]}"
    if verb in ("start", "stop", "shutdown", "reboot", "reset"):
        wait(call("POST", f"{one}/status/{verb}", options))
        return None
    if verb == "status":
        return "status: " + str(call("GET", f"{one}/status/current")["status"])
    if verb == "config":
        found = call("GET", f"{one}/config", options)
        return {key: value for key, value in found.items() if key != "digest"}
    if verb == "pending":
        return call("GET", f"{one}/pending")
    if verb == "set":
        wait(call("POST", f"{one}/config", options))
        changed = " ".join(f"-{key} {value}" for key, values in options.items() for value in values)
        return f"update VM {words[1]}: {changed}"
    if verb == "unlock":
        call("PUT", f"{one}/config", {"delete": ["lock"], "skiplock": ["1"]})
        return None
    if verb == "destroy":
        wait(call("DELETE", one, options))
        return None
    if verb in ("resize", "disk"):
        rest = words[1:] if verb == "resize" else words[2:]
        need(rest, 3, "qm resize")
        wait(call("PUT", f"{base}/{rest[0]}/resize", {"disk": [rest[1]], "size": [rest[2]]}))
        return None
    if verb == "cloudinit":
        return qm_cloud_init(words[1:], base)
    if verb == "guest":
        return qm_guest(words[1:], base, options)
    usage("qm", words)


def qm_cloud_init(words: list[str], base: str) -> Any:
    need(words, 2, "qm cloudinit")
    if words[0] == "dump":
        need(words, 3, "qm cloudinit dump")
        return str(call("GET", f"{base}/{words[1]}/cloudinit/dump", {"type": [words[2]]})).rstrip("\n")
    return call("PUT", f"{base}/{words[1]}/cloudinit")


def qm_guest(words: list[str], base: str, options: Options) -> Any:
    """`qm guest exec ID -- COMMAND`, `qm guest cmd ID ping`. A command's own status is in what is printed."""
    need(words, 3, "qm guest")
    agent = f"{base}/{words[1]}/agent"
    if words[0] == "cmd":
        method = "POST" if words[2] == "ping" else "GET"
        return call(method, f"{agent}/{words[2]}")
    if words[0] != "exec":
        usage("qm", ["guest", *words])
    waits = options.get("synchronous", ["1"])[-1] == "1"
    if not waits and "timeout" in options:
        raise Failed("400 Parameter verification failed.\nsynchronous: needs to be set for 'timeout'")
    request = {"command": words[2:]}
    if options.get("pass-stdin", ["0"])[-1] == "1":
        data = sys.stdin.buffer.read(STDIN_MAX + 1)
        if len(data) > STDIN_MAX:
            raise Failed("'input-data' (STDIN) is limited to 1 MiB, aborting")
        request["input-data"] = [data.decode()]
    found = call("POST", f"{agent}/exec", request)
    # 0 waits without an end.
    timeout = int(options.get("timeout", ["30"])[-1])
    deadline = time.monotonic() + timeout
    while waits and (timeout == 0 or time.monotonic() < deadline):
        status = call("GET", f"{agent}/exec-status", {"pid": [str(found["pid"])]})
        if status["exited"]:
            found = status
            break
        time.sleep(POLL_S)
    if waits and "exited" not in found:
        print("timeout reached, returning pid", file=sys.stderr)
    print(json.dumps(found, indent=3, sort_keys=True))
    return None


def vzdump(words: list[str], options: Options) -> Any:
    """`vzdump ID… --storage STORAGE`: the worker's log is printed as PVE does, and its end is the command's."""
    if words:
        options["vmid"] = [",".join(words)]
    return worker(call("POST", f"/nodes/{node()}/vzdump", options))


def qmrestore(words: list[str], options: Options) -> Any:
    need(words, 2, "qmrestore")
    return worker(call("POST", f"/nodes/{node()}/qemu", {"archive": [words[0]], "vmid": [words[1]], **options}))


def worker(upid: str) -> None:
    """Wait for a worker whose log is the command's output, all of it but its last line."""
    try:
        wait(upid)
    finally:
        for entry in call("GET", f"/nodes/{node()}/tasks/{upid}/log", {"limit": ["5000"]}):
            if not entry["t"].startswith("TASK "):
                print(entry["t"])


def pvesh(words: list[str], options: Options) -> Any:
    methods = {"get": "GET", "set": "PUT", "create": "POST", "delete": "DELETE", "ls": "GET"}
    need(words, 2, "pvesh")
    if words[0] not in methods:
        usage("pvesh", words)
    options.pop("noborder", None)
    path = words[1].replace("/nodes/localhost", f"/nodes/{node()}")
    result = call(methods[words[0]], path, options)
    if words[0] != "get" and isinstance(result, str) and result.startswith("UPID:"):
        return wait(result)
    return result


def pvenode(words: list[str], options: Options) -> Any:
    if words[:2] == ["cert", "info"]:
        return call("GET", f"/nodes/{node()}/certificates/info")
    usage("pvenode", words)


TOOLS = {
    "pveum": pveum,
    "pvesm": pvesm,
    "qm": qm,
    "qmrestore": qmrestore,
    "pvesh": pvesh,
    "pvenode": pvenode,
    "vzdump": vzdump,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv))
