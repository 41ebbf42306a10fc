"""Worlds of processes on this machine, as torchrun would start them, but forked from one that has imported torch: many
of them then start in the time of one.

``python tests/worlds.py < JOBS`` runs one after another the jobs of a JSON list and prints a JSON list of what each
wrote to stderr, or ends with what the first that went wrong wrote. A job is an object: its ``size``, 0 for one process
without torchrun, the ``arguments`` of ``dalle`` and, where needed,
- ``begun``: a run folder whose last checkpoint alone is copied to ``--out`` beforehand;
- ``struck``: [rank, update, signal], what one process gets, and in the midst of which update;
- ``told``: true to have each process write to stderr the squares of the error sums that it took from a checkpoint;
- ``restarts``: how often torchrun would have started the processes before;
- ``fails``: true where that is expected.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

# What the processes would each import, PIL and _dynamo first as they run; nothing may compute before they are forked.
import PIL.Image  # noqa: F401
import torch
import torch._dynamo

import dalle.train.shard_files  # noqa: F401
from dalle.cli import main
from dalle.train.dalle import DALLEStage
from dalle.train.loop import latest_checkpoint
from dalle.train.torchrun import Team


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, size: int, port: int, restarts: int) -> dict[str, str]:
    """What torchrun tells a process on its only machine."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": restarts}
    return {name: str(value) for name, value in {**ranks, **where}.items()}


def signal_in(rank: int, update: int, number: int) -> None:
    """Let the process of ``rank`` send itself a signal from inside an update."""
    loss = DALLEStage.loss

    def struck(stage: DALLEStage, current: int) -> Any:
        if current == update and os.environ.get("RANK", "0") == str(rank):
            os.kill(os.getpid(), number)
        return loss(stage, current)

    DALLEStage.loss = struck


def tell_errors() -> None:
    """Let a process say what its error buffers sum to once they have been loaded."""
    take = Team.take_error_sums

    def told(team: Team, sums: dict[str, torch.Tensor]) -> None:
        take(team, sums)
        taken = {name: total.square().sum().item() for name, total in team.error_sums().items()}
        print(f"errors: {json.dumps(taken)}", file=sys.stderr)

    Team.take_error_sums = told


def start(variables: dict[str, str], job: dict[str, Any], said: int) -> int:
    """Fork a process that runs the job; returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(said, sys.stderr.fileno())
        os.environ.update(variables)
        if "struck" in job:
            signal_in(*job["struck"])
        if job.get("told"):
            tell_errors()
        status = main(job["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(children: set[int]) -> int:
    """Until all have ended, the others by force when one fails, as torchrun does; returns the first bad status."""
    failed = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        if status and not failed:
            failed = os.waitstatus_to_exitcode(status)
            for other in children:
                os.kill(other, signal.SIGTERM)
    return failed


def run(job: dict[str, Any]) -> str:
    """Run a job and return what it wrote to stderr."""
    if "begun" in job:
        checkpoint = latest_checkpoint(job["begun"])
        if checkpoint is None:
            sys.exit(f"{job['begun']} holds no checkpoint: the job that was to be stopped there failed before")
        out = Path(job["arguments"][job["arguments"].index("--out") + 1])
        shutil.copytree(checkpoint, out / "checkpoints" / checkpoint.name)
        shutil.copy(Path(job["begun"]) / "log.jsonl", out)
    port = free_port()
    size, restarts = job["size"], job.get("restarts", 0)
    variables = [environment(rank, size, port, restarts) for rank in range(size)] or [{}]
    with tempfile.TemporaryFile("w+") as said:
        failed = wait({start(each, job, said.fileno()) for each in variables})
        said.seek(0)
        text = said.read()
    if bool(failed) != job.get("fails", False):
        sys.exit(f"{job} ended with status {failed}:\n{text}")
    return text


if __name__ == "__main__":
    words = [run(job) for job in json.load(sys.stdin)]
    print(json.dumps(words))
