"""Start a script as one process of every slot of every node, and write its logs.

This is the one place that knows torchrun (with `run_processes.py`, which it starts) and the environment
variables of nodes. Where a launcher has already set all ranks, it only runs the script. Rank 0's output
goes to the terminal and to `--log`; the output of every other rank goes to a file below `{log}.ranks`.
On every node but the first, the log's name ends in the node's number.

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

from rlhf.errors import UserError, killed_by, run_main
from rlhf.machine import visible_gpus

# OpenMP's threads spin only briefly while they wait for each other. By default they spin for long, which makes a
# training several times slower when anything else uses the CPU; without any spinning it is slower on an idle
# machine (`tests/bench/threads.py`).
BRIEF_SPINNING = {"GOMP_SPINCOUNT": "1000"}
GPU_PAUSE = 10.0  # seconds between looks for a free GPU
RANKS = {"LOCAL_RANK", "RANK", "WORLD_SIZE"}  # what a launcher sets
BAR_SECONDS = 10.0  # between the lines that a progress bar writes to the log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1, help="processes of all nodes together")
    parser.add_argument(
        "--gpus", type=int, default=0, help="GPUs of this node, which no other job of ours uses"
    )
    parser.add_argument("--log", type=Path, required=True, help="file for rank 0's output")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    program = [args.script, *args.arguments]
    if os.environ.keys() >= RANKS:
        os.execve(sys.executable, [sys.executable, *program], {**BRIEF_SPINNING, **os.environ})
    if "LOCAL_RANK" in os.environ:
        missing = " and ".join(sorted(RANKS - os.environ.keys()))
        print(f"LOCAL_RANK is left over from something else (without {missing}) and ignored", file=sys.stderr)
    nodes, node = int(os.environ.get("NNODES", "1")), int(os.environ.get("NODE_RANK", "0"))
    if args.processes % nodes:
        raise UserError(
            f"{args.processes} processes cannot be divided evenly among NNODES={nodes} nodes: change run.processes or run.nodes"
        )
    log = args.log.with_name(f"{args.log.name}.node-{node}") if node else args.log
    if args.processes == 1:
        command = [sys.executable, *program]
        environment = single_process()
    else:
        command = [*_torchrun(nodes, node, args.processes // nodes, log), *program]
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # else torchrun warns
    with _gpus(args.gpus) as devices:
        sys.exit(_run(command, {**BRIEF_SPINNING, **os.environ, **environment, **devices}, log))


@contextmanager
def _gpus(count: int) -> Iterator[dict[str, str]]:
    """Reserve GPUs of this machine that no other job of ours uses, until the end of the block.

    A job that requests none gets none, so that two trainings never share one by accident.
    """
    gpus = visible_gpus() if count else []
    if len(gpus) < count:
        raise UserError(f"run.gpus = {count}, but this machine has {len(gpus)}: lower `gpus` in the run")
    with ExitStack() as stack:
        while len(held := list(islice((gpu for gpu in gpus if _reserve(gpu, stack)), count))) < count:
            stack.close()  # all or none: two jobs that each hold a part would wait for ever
            print(
                f"waiting for {count} GPUs: {len(held)} of {len(gpus)} are free", file=sys.stderr, flush=True
            )
            time.sleep(GPU_PAUSE)
        # Without DS_ACCELERATOR DeepSpeed looks for every accelerator it knows, and warns that there is none.
        yield {"CUDA_VISIBLE_DEVICES": ",".join(held), **({} if held else {"DS_ACCELERATOR": "cpu"})}


def _reserve(gpu: str, stack: ExitStack) -> bool:
    """Reserve a GPU unless another job has it; `stack` releases it."""
    name = f"snakemake-rlhf-gpu-{gpu.replace('/', '-')}.lock"
    file = _lock_file(Path(tempfile.gettempdir()) / name)
    stack.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock_file(path: Path) -> int:
    """Open a lock that users of this machine share; a file need not be writable to be locked."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY)
    if os.fstat(file).st_uid == os.getuid():
        os.fchmod(file, 0o666)  # whatever the umask
    return file


def single_process() -> dict[str, str]:
    """Return what torchrun would set for one process. Port 0 is any free port: nobody else needs it."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def _torchrun(nodes: int, node: int, processes: int, log: Path) -> list[str]:
    """Return torchrun's command line: the first process of a node prints, the others write files.

    On one node torchrun itself binds a free port: a port that is chosen earlier may be in use by then.
    """
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    several = [
        "--nnodes",
        str(nodes),
        "--node-rank",
        str(node),
        "--master-addr",
        address,
        "--master-port",
        port,
    ]
    meeting = several if nodes > 1 else ["--standalone", "--local-addr", "127.0.0.1"]
    quiet = ",".join(f"{rank}:3" for rank in range(1, processes))
    return [
        sys.executable,
        str(Path(__file__).with_name("run_processes.py")),
        *meeting,
        "--nproc-per-node",
        str(processes),
        "--log-dir",
        f"{log}.ranks",
        *(["--redirects", quiet] if quiet else []),
        "--",  # the rest are the script's options, even where torchrun has similar ones
    ]


def _run(command: list[str], environment: dict[str, str], log: Path) -> int:
    """Run to the end, copying output to the terminal and the log; return the exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment["PYTHONUNBUFFERED"] = "1"
    with log.open("a+b") as file:  # a second attempt keeps the log of the first
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        signal.signal(signal.SIGTERM, lambda received, _: process.send_signal(received))
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C: the terminal sends it to the script, too
        assert process.stdout is not None
        _copy(process.stdout, file)
        code = process.wait()
        if code < 0:
            sentence = f"error: {killed_by('the process', -code)}\n"
            sys.stderr.write(sentence)
            file.write(sentence.encode())
        _keep(file, log)
    return code if code >= 0 else 128 - code


def _keep(file: BinaryIO, log: Path) -> None:
    """Write the log again if it was removed meanwhile: Snakemake removes it at a second start."""
    file.flush()
    if log.exists() and os.path.samestat(os.fstat(file.fileno()), log.stat()):
        return
    file.seek(0)
    with log.open("ab") as again:
        shutil.copyfileobj(file, again)


def _copy(source: BinaryIO, log: BinaryIO) -> None:
    """Copy output to a terminal as it comes, and to logs with few lines of each progress bar.

    Where stderr is no terminal it is a log, too: of a pod, or of whoever started this.
    """
    last_bar, pending, terminal = 0.0, b"", sys.stderr.isatty()
    copies = [log] if terminal else [log, sys.stderr.buffer]
    while chunk := os.read(source.fileno(), 65536):
        if terminal:
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()
        *lines, pending = (pending + chunk).replace(b"\r\n", b"\n").splitlines(keepends=True) or [b""]
        if pending.endswith((b"\n", b"\r")):
            lines, pending = [*lines, pending], b""
        for line in lines:
            if line.endswith(b"\n"):
                _write(line, copies)
            elif time.monotonic() - last_bar > BAR_SECONDS and line.strip():
                last_bar = time.monotonic()
                _write(line.strip() + b"\n", copies)
    _write(pending, copies)


def _write(line: bytes, files: list[BinaryIO]) -> None:
    for file in files:
        file.write(line)
        file.flush()


if __name__ == "__main__":
    run_main(main)
