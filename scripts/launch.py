"""Start a script as one process of every slot of every node, and write its logs.

The one place that knows torchrun (with `run_processes.py`, which it starts) and the environment
variables of nodes. Where a launcher has set LOCAL_RANK already the script is simply run. Rank 0's output
goes to the terminal and to `--log`; with several processes every other rank's goes to a file below
`{log}.ranks`. On nodes but the first the log's name ends in the node's number.

    python scripts/launch.py --processes 2 --log logs/x.log scripts/train_sft.py --spec ...
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from rlhf.errors import UserError, run_main
from rlhf.machine import visible_gpus

GPU_PAUSE = 10.0  # seconds between looks for a free GPU
BAR_SECONDS = 10.0  # a progress bar leaves one line in the log per so many seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1, help="processes of all nodes together")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of this node that it gets to itself")
    parser.add_argument("--log", type=Path, required=True, help="where rank 0's output goes")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    program = [args.script, *args.arguments]
    if "LOCAL_RANK" in os.environ:
        os.execv(sys.executable, [sys.executable, *program])
    nodes, node = int(os.environ.get("NNODES", "1")), int(os.environ.get("NODE_RANK", "0"))
    if args.processes % nodes:
        raise UserError(f"{args.processes} processes cannot be shared out evenly over NNODES={nodes} nodes")
    log = args.log.with_name(f"{args.log.name}.node-{node}") if node else args.log
    if args.processes == 1:
        command = [sys.executable, *program]
        environment = _single_process()
    else:
        command = [*_torchrun(nodes, node, args.processes // nodes, log), *program]
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # torchrun warns else
    with _gpus(args.gpus) as devices:
        sys.exit(_run(command, {**os.environ, **environment, **devices}, log))


@contextmanager
def _gpus(count: int) -> Iterator[dict[str, str]]:
    """Take GPUs of this machine that no other job of ours uses, until the end of the block.

    A job that asks for none gets none, so that two trainings never share one by accident.
    """
    there = visible_gpus() if count else []
    if len(there) < count:
        raise UserError(f"{count} GPUs are asked for, this machine has {len(there)}: lower `gpus` in the run")
    with ExitStack() as stack:
        while len(held := list(islice((d for d in there if _take(d, stack)), count))) < count:
            stack.close()  # all or none: two jobs that each hold a part would wait for ever
            print(
                f"waiting for {count} GPUs: {len(held)} of {len(there)} are free", file=sys.stderr, flush=True
            )
            time.sleep(GPU_PAUSE)
        # Otherwise DeepSpeed probes for every accelerator it knows and warns that it found none.
        yield {"CUDA_VISIBLE_DEVICES": ",".join(held), **({} if held else {"DS_ACCELERATOR": "cpu"})}


def _take(device: str, stack: ExitStack) -> bool:
    """Take a device unless another job has it; it is given back when `stack` ends."""
    name = f"snakemake-rlhf-gpu-{device.replace('/', '-')}.lock"
    file = _lock_file(Path(tempfile.gettempdir()) / name)
    stack.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock_file(path: Path) -> int:
    """Open a lock that users of this machine share; what another one owns need not be writable to lock it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY)
    if os.fstat(file).st_uid == os.getuid():
        os.fchmod(file, 0o666)  # whatever the umask
    return file


def _single_process() -> dict[str, str]:
    """Return what torchrun would set for one process. Port 0 is any free one: nobody else has to know it."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def _torchrun(nodes: int, node: int, processes: int, log: Path) -> list[str]:
    """Return torchrun's command line: the first process of a node prints, the others write files.

    On one node torchrun itself binds a free port: one that is chosen before may be taken by the time it is used.
    """
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    several = [
        "--nnodes", str(nodes), "--node-rank", str(node), "--master-addr", address, "--master-port", port,
    ]  # fmt: skip
    meeting = several if nodes > 1 else ["--standalone", "--local-addr", "127.0.0.1"]
    quiet = ",".join(f"{rank}:3" for rank in range(1, processes))
    return [
        sys.executable, str(Path(__file__).with_name("run_processes.py")),
        *meeting, "--nproc-per-node", str(processes),
        "--log-dir", f"{log}.ranks", *(["--redirects", quiet] if quiet else []),
        "--",  # what follows is the script's, though torchrun has options that begin alike
    ]  # fmt: skip


def _run(command: list[str], environment: dict[str, str], log: Path) -> int:
    """Run to the end, copying output to the terminal and the log; return the exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment["PYTHONUNBUFFERED"] = "1"
    with log.open("a+b") as file:  # a second try does not wipe out what the first one said
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        signal.signal(signal.SIGTERM, lambda received, _: process.send_signal(received))
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C: the terminal sends it to the script, too
        assert process.stdout is not None
        _copy(process.stdout, file)
        code = process.wait()
        if code < 0:
            said = f"error: {ended_by(-code)}\n"
            sys.stderr.write(said)
            file.write(said.encode())
        _keep(file, log)
    return code if code >= 0 else 128 - code


def _keep(file: BinaryIO, log: Path) -> None:
    """Put what was written back where somebody removed the log meanwhile: Snakemake does, at a second start."""
    file.flush()
    if log.exists() and os.path.samestat(os.fstat(file.fileno()), log.stat()):
        return
    file.seek(0)
    with log.open("ab") as again:
        shutil.copyfileobj(file, again)


def ended_by(number: int) -> str:
    """Return in words that a signal ended the script, why that may be, and how to go on."""
    why = ", as the kernel does when memory runs out (mem_mb)" if number == signal.SIGKILL else ""
    return f"the process was ended by {signal.Signals(number).name}{why}; the same command goes on from what is saved"


def _copy(source: BinaryIO, log: BinaryIO) -> None:
    """Copy output to stderr as it comes, and to the log with progress bars thinned out."""
    last_bar, pending = 0.0, b""
    while chunk := os.read(source.fileno(), 65536):
        sys.stderr.buffer.write(chunk)
        sys.stderr.buffer.flush()
        *lines, pending = (pending + chunk).replace(b"\r\n", b"\n").splitlines(keepends=True) or [b""]
        if pending.endswith((b"\n", b"\r")):
            lines, pending = [*lines, pending], b""
        for line in lines:
            if line.endswith(b"\n"):
                log.write(line)
            elif time.monotonic() - last_bar > BAR_SECONDS and line.strip():
                last_bar = time.monotonic()
                log.write(line.strip() + b"\n")
        log.flush()
    log.write(pending)


if __name__ == "__main__":
    run_main(main)
