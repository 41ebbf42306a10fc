"""Worlds of processes on this machine, as torchrun would start them, but forked from one that has imported torch: many
of them then start in the time of one.

``python tests/worlds.py < JOBS`` runs one after another the jobs of a JSON list, each ``[size, arguments of dalle]``, and
prints the list of their exit statuses, the worst of a world's processes each. Size 0 means one process without torchrun.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback

# What the processes would each import; nothing may compute before they are forked.
import dalle.train.dalle
import dalle.train.shard_files
import dalle.train.torchrun  # noqa: F401
from dalle.cli import main


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process on its only machine."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in {**ranks, **where}.items()}


def start(variables: dict[str, str], arguments: list[str]) -> int:
    """Fork a process that runs the command; returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(variables)
        status = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def run(size: int, arguments: list[str]) -> int:
    port = free_port()
    variables = [environment(rank, size, port) for rank in range(size)] or [{}]
    children = [start(each, arguments) for each in variables]
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    statuses = [run(*job) for job in json.load(sys.stdin)]
    print(json.dumps(statuses))
