from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from itertools import count
from pathlib import Path

import launch
import pytest
from conftest import heed_ctrl_c

from rlhf.errors import RESUMABLE, UserError
from rlhf.machine import visible_gpus

LAUNCH = Path(__file__).parents[3] / "scripts/launch.py"
PROGRAM = """
import os, sys
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "local", os.environ["LOCAL_RANK"], *sys.argv[1:])
if sys.argv[1] == "mistake-" + os.environ["RANK"]:
    print("error: a mistake", file=sys.stderr)
    sys.exit(2)
sys.exit(3 if sys.argv[1] == "fail-" + os.environ["RANK"] else 0)
"""


@pytest.fixture
def start(tmp_path):
    """Return a function: start the launcher, with environment variables, on a program that prints its rank."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def go(*options, argument="x", stdin=None, **environment):
        clean = {
            k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NNODES")
        }
        command = [
            sys.executable,
            LAUNCH,
            *options,
            "--log",
            tmp_path / "log",
            tmp_path / "program.py",
            argument,
        ]
        return subprocess.Popen(
            [str(part) for part in command],
            env=clean | environment,
            stdin=stdin,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=heed_ctrl_c,
        )

    return go


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_one_process_is_rank_0_of_1(start, tmp_path):
    process = start()
    said = process.communicate()[1]
    assert process.returncode == 0
    assert said == (tmp_path / "log").read_text() == "rank 0 of 1 local 0 x\n"


def test_of_two_processes_the_first_prints_and_the_other_writes_a_file(start, tmp_path):
    process = start("--processes", "2")
    said = process.communicate()[1]
    assert process.returncode == 0
    assert "rank 0 of 2 local 0 x" in said
    assert "rank 1" not in said
    assert "rank 0 of 2 local 0 x" in (tmp_path / "log").read_text()
    others = [p.read_text() for p in (tmp_path / "log.ranks").rglob("stdout.log")]
    assert others == ["rank 1 of 2 local 1 x\n"]


MEETING = """
import os, torch, torch.distributed as group
from rlhf import parallel
group.init_process_group("gloo")
group.all_reduce(count := torch.ones(1))
print("met", int(count), "at port", os.environ["MASTER_PORT"])
parallel.leave()
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_no_port_is_chosen_before_it_is_bound(start, tmp_path, processes):
    """Another training that starts at the same moment could take it."""
    (tmp_path / "program.py").write_text(MEETING)
    process = start("--processes", str(processes))
    said = process.communicate()[1]
    assert process.returncode == 0
    assert re.search(rf"met {processes} at port (\d+)", said)
    assert ("at port 0\n" in said) == (processes == 1)


def test_options_of_the_script_are_not_taken_for_torchruns(start, tmp_path):
    process = start("--processes", "2", argument="--run")
    process.communicate()
    assert process.returncode == 0
    assert "rank 0 of 2 local 0 --run" in (tmp_path / "log").read_text()


def test_two_nodes_share_the_processes_and_the_second_has_a_log_of_its_own(start, tmp_path):
    common = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = [start("--processes", "2", NODE_RANK=str(n), **common) for n in range(2)]
    assert [node.wait(timeout=60) for node in nodes] == [0, 0]
    assert "rank 0 of 2 local 0 x" in (tmp_path / "log").read_text()
    assert "rank 1 of 2 local 0 x" in (tmp_path / "log.node-1").read_text()


def test_processes_that_do_not_divide_over_nodes_are_refused(start):
    process = start("--processes", "3", NNODES="2")
    assert "3 processes cannot be divided evenly among NNODES=2 nodes" in process.communicate()[1]
    assert process.returncode == 2


def test_under_another_launcher_the_script_is_simply_run(start):
    process = start("--processes", "8", LOCAL_RANK="2", RANK="2", WORLD_SIZE="8")
    process.communicate()
    assert process.returncode == 0


def test_a_local_rank_that_is_left_over_is_ignored_and_reported(start, tmp_path):
    """axolotl#1211: it was taken for another launcher's, which set nothing else."""
    process = start("--processes", "1", LOCAL_RANK="3")
    assert (
        "LOCAL_RANK is left over from something else (without RANK and WORLD_SIZE)"
        in process.communicate()[1]
    )
    assert process.returncode == 0
    assert "rank 0 of 1 local 0" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_fails_the_launch(start, rank):
    process = start("--processes", "2", argument=f"fail-{rank}")
    process.communicate()
    assert process.returncode == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_users_mistake_in_any_process_ends_the_launch_as_one(start, rank):
    """Exit code 2, and no report on processes that have nothing to do with it."""
    process = start("--processes", "2", argument=f"mistake-{rank}")
    said = process.communicate()[1]
    assert process.returncode == 2
    assert "Traceback" not in said
    assert ["error: a mistake", "error: process 1 says in its own log what is wrong"][rank] in said


@pytest.mark.parametrize(("given", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
@pytest.mark.parametrize("processes", [1, 2])
def test_threads_spin_briefly_unless_the_environment_says_otherwise(
    start, tmp_path, processes, given, expected
):
    (tmp_path / "program.py").write_text("import os; print('spins', os.environ['GOMP_SPINCOUNT'])")
    said = start("--processes", str(processes), **given).communicate()[1]
    assert f"spins {expected}\n" in said


def test_one_process_hands_on_its_exit_code(start):
    process = start(argument="fail-0")
    process.communicate()
    assert process.returncode == 3


def test_a_log_that_is_removed_while_the_script_runs_is_written_again_at_its_end(start, tmp_path):
    """As by a second Snakemake, whose own job is refused and says so there."""
    waits = "import sys; print('begun', flush=True); sys.stdin.read(1); print('done')"
    (tmp_path / "program.py").write_text(waits)
    process = start(stdin=subprocess.PIPE)
    assert process.stderr.readline() == "begun\n"
    (tmp_path / "log").unlink()
    (tmp_path / "log").write_text("error: in use\n")
    process.communicate(input="x")
    assert process.returncode == 0
    assert (tmp_path / "log").read_text() == "error: in use\nbegun\ndone\n"


def test_a_process_that_is_killed_is_reported_with_what_that_may_mean(start, tmp_path):
    (tmp_path / "program.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    process = start()
    said = process.communicate()[1]
    assert process.returncode == 128 + 9
    assert said == (tmp_path / "log").read_text()
    assert said.startswith("error: the process was ended by SIGKILL, as the kernel does when memory runs out")
    assert said.endswith("; the same command resumes from the last saved state\n")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_training_has_an_exit_code_of_its_own(start, tmp_path, processes):
    (tmp_path / "program.py").write_text(f"import sys; sys.exit({RESUMABLE})")
    process = start("--processes", str(processes))
    process.communicate()
    assert process.returncode == RESUMABLE


WAITS = """
import time
from rlhf.errors import run_main

def main():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.3)
        print("put in order", flush=True)

run_main(main)
"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process_without_a_traceback(start, tmp_path, processes, number):
    """Ctrl-C comes to all processes of a terminal, and lets them end; a cluster's SIGTERM to the launcher alone."""
    (tmp_path / "program.py").write_text(WAITS)
    process = start("--processes", str(processes))
    while "begun" not in process.stderr.readline():
        assert process.poll() is None
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    assert ("put in order" in said) == (number == signal.SIGINT)


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """A machine with two GPUs, as far as launch.py looks."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: str(tmp_path))


def test_jobs_get_gpus_of_their_own_and_give_them_back(gpus):
    with launch._gpus(1) as first, launch._gpus(1) as second:
        assert [first, second] == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    with launch._gpus(2) as both:
        assert both == {"CUDA_VISIBLE_DEVICES": "0,1"}


def test_a_lock_that_another_user_owns_is_taken_without_writing(gpus, monkeypatch, tmp_path):
    path = tmp_path / "snakemake-rlhf-gpu-0.lock"
    path.touch(0o644)
    opened = os.open

    def refuse(name, flags, *mode):
        if flags & os.O_ACCMODE != os.O_RDONLY and Path(name) == path:
            raise PermissionError(13, "Permission denied", name)
        return opened(name, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with launch._gpus(1) as first, launch._gpus(1) as second:
        assert [d["CUDA_VISIBLE_DEVICES"] for d in (first, second)] == ["0", "1"]


def test_locks_may_be_used_by_every_user(gpus, tmp_path):
    before = os.umask(0o077)
    try:
        with launch._gpus(1):
            assert (tmp_path / "snakemake-rlhf-gpu-0.lock").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("0, 1", ["0", "1"]),
        ("-1", []),
        ("", []),
        ("1,-1,0", ["1"]),
        ("NoDevFiles", []),
        ("GPU-a,,0", ["GPU-a"]),
    ],
)
def test_gpus_are_counted_as_cuda_counts_them(monkeypatch, visible, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == names


def test_a_job_waits_for_gpus_that_others_use_and_holds_none_meanwhile(gpus, monkeypatch, capfd):
    other = launch._gpus(1)
    other.__enter__()

    def the_other_ends(_):
        with launch._gpus(1):
            pass
        other.__exit__(None, None, None)

    monkeypatch.setattr(launch.time, "sleep", the_other_ends)
    with launch._gpus(2) as both:
        assert both == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert "waiting for 2 GPUs: 1 of 2 are free" in capfd.readouterr().err


def test_more_gpus_than_there_are_is_an_error_and_none_gives_none(gpus):
    with pytest.raises(UserError, match=r"run\.gpus = 3, but this machine has 2: lower"), launch._gpus(3):
        pass
    with launch._gpus(0) as none:
        assert none == {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize("terminal", [True, False])
def test_logs_hold_every_line_and_few_of_a_bars_and_a_terminal_all(
    tmp_path, monkeypatch, capfdbinary, terminal
):
    """A bar is drawn over and over after a carriage return. Without a terminal stderr is a log, as in a pod."""
    monkeypatch.setattr(launch.sys.stderr, "isatty", lambda: terminal)
    clock = count(100.0, 3.0)  # seconds: each look at the clock is 3 later
    monkeypatch.setattr(launch.time, "monotonic", lambda: next(clock))
    said = b"begin\r\n\rbar 1\rbar 2\rbar 3\rbar 4\rbar 5\ndone\nno end"
    reader, writer = os.pipe()
    os.write(writer, said)
    os.close(writer)
    with os.fdopen(reader, "rb") as source, (tmp_path / "log").open("wb") as log:
        launch._copy(source, log)
    thinned = b"begin\nbar 1\nbar 5\ndone\nno end"
    assert capfdbinary.readouterr().err == (said if terminal else thinned)
    assert (tmp_path / "log").read_bytes() == thinned
