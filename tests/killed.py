"""``dalle`` for torchrun to start. In the first start a process is killed while it writes its second checkpoint,
whose data are there and whose index is not.
"""

from __future__ import annotations

import os
import signal
import sys

import torch.distributed.checkpoint as dcp

from dalle.cli import main


def kill_in_saving() -> None:
    write_data = dcp.FileSystemWriter.write_data

    def struck(writer, *arguments):
        written = write_data(writer, *arguments)
        if "update-00000004" in str(writer.path):
            written.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    dcp.FileSystemWriter.write_data = struck


if __name__ == "__main__":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "0":
        kill_in_saving()
    sys.exit(main(sys.argv[1:]))
