# SPDX-License-Identifier: MIT
"""`python -m rehearsal`: the embedded lab on this machine.

up [--nodes pve1,pve2] [--hardware FILE]   bring it up, with roles and tokens; guests are made by a deploy
down                                       end all of it; caches stay
status                                     what runs
shell HOST                                 a root shell in a host, without SSH
packages [--kernel]                        install the Debian packages that the lab (the kernel tier) and its tests need
ssh-config FILE                            write an OpenSSH configuration for the lab's nodes
rehearse [--keep] [--full]                 the whole job on the lab, from nothing; then rebuilds and a restore
bench                                      the budgets beside what the last rehearsal measured
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from inventory import GpulabError
from rehearsal import bench, full, lab, machine, node, rehearse
from rehearsal.kernel import qemu


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m rehearsal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="bring the lab up")
    up.add_argument(
        "--nodes", default=",".join(lab.NODES), help="names of the nodes, with commas (default: %(default)s)"
    )
    up.add_argument("--hardware", type=Path, default=node.MACHINE, help="hardware.json of the nodes")
    commands.add_parser("down", help="end all of the lab; caches stay")
    commands.add_parser("status", help="show what runs")
    shell = commands.add_parser("shell", help="open a root shell in a host, without SSH")
    shell.add_argument("host")
    needed = commands.add_parser("packages", help="install the Debian packages that the lab and its tests need")
    needed.add_argument("--kernel", action="store_true", help="those of the kernel tier instead")
    ssh = commands.add_parser("ssh-config", help="write an OpenSSH configuration for the lab's hosts")
    ssh.add_argument("file", type=Path)
    whole = commands.add_parser("rehearse", help="the whole job on the lab, from nothing")
    whole.add_argument("--keep", action="store_true", help="leave the lab up")
    whole.add_argument("--full", action="store_true", help="then rebuild, roll back, destroy and restore the guest")
    commands.add_parser("bench", help="show the budgets beside what the last rehearsal measured")
    options = parser.parse_args(argv)
    try:
        match options.command:
            case "up":
                lab.up([name for name in options.nodes.split(",") if name], options.hardware)
                rehearse.bootstrap()
            case "down":
                ended = lab.down()
                print("\n".join(f"ended {what}" for what in ended) or "nothing was up")
            case "status":
                lab.show_status()
            case "shell":
                return lab.shell(options.host)
            case "packages":
                machine.install(print, qemu.PACKAGES if options.kernel else machine.PACKAGES)
                if options.kernel and (reason := qemu.missing()):
                    raise GpulabError(f"No kernel machine can run here: {reason}")
            case "ssh-config":
                lab.write_ssh_config(options.file)
            case "rehearse":
                return rehearse.rehearse(options.keep, full.phases if options.full else None)
            case "bench":
                return bench.bench()
    except GpulabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
