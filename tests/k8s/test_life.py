"""A gang outlives its controller: taken up, adopted, replaced, never doubled."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import harness
from harness import kill, wait_until

# Each run of the command leaves a line in `runs`; checkpoints go to an undeclared file. The output is in a
# directory of its own: Snakemake removes empty ones when it ends.
COUNTING = r"""
rule count:
    output: "out/done.txt"
    resources: nodes={nodes}
    retries: {retries}
    shell:
        '[ $NODE_RANK = 0 ] || {{{{ while [ ! -e stop-$GANG_TOKEN ]; do sleep 0.3; done; exit 0; }}}};'
        ' echo started >> runs; n=$(cat checkpoint 2>/dev/null || echo 0);'
        ' while [ $n -lt {seconds} ]; do sleep 1; n=$((n + 1)); echo $n > checkpoint; echo step $n; done;'
        ' touch stop-$GANG_TOKEN; echo finished > {{output}}'
"""


def counting(seconds: int, nodes: int = 1, retries: int = 0) -> str:
    return COUNTING.format(seconds=seconds, nodes=nodes, retries=retries)


def runs(place) -> int:
    path = place.path / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


def steps(place) -> int:
    path = place.path / "checkpoint"
    return int(path.read_text() or 0) if path.exists() else 0


def ended(place) -> bool:
    jobs = place.objects("jobs")
    return any(c["type"] == "Complete" for job in jobs for c in job.get("status", {}).get("conditions", []))


MOMENTS = {
    "planned": lambda place: "Select jobs to execute" in place.said(),
    "token-written": lambda place: list(place.path.glob(".snakemake/auxiliary/kubernetes-gang/*/token")),
    "service-created": lambda place: place.objects("services"),
    "job-created": lambda place: place.objects("jobs"),
    "pods-created": lambda place: place.objects("pods"),
    "running": lambda place: runs(place),
    "half-way": lambda place: steps(place) >= 3,
    "output-there": lambda place: (place.path / "out/done.txt").exists(),
    "ended": ended,
    "deleting": lambda place: (
        "Finished jobid" in place.said() or (not place.objects("jobs") and steps(place) >= 6)
    ),
}


def killed_at(moment: str) -> harness.Workdir:
    """Kill a controller at a moment, while it is alive; one that was quicker has another chance."""
    for attempt in range(3):
        place = harness.Workdir(f"kill-{moment}-{attempt}", counting(6, nodes=2))
        if was_killed(place, moment):
            return place
    raise AssertionError(f"no controller was alive when {moment} was seen:\n{place.said()}")


def was_killed(place, moment: str) -> bool:
    process = place.start()
    wait_until(moment, lambda: MOMENTS[moment](place) or process.poll() is not None, 90, every_s=0.02)
    kill(process)
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def killed():
    """Ten controllers, each killed at another moment, then started again: what became of each."""

    def one(moment: str) -> tuple[str, int, str, harness.Workdir]:
        place = killed_at(moment)
        if moment == "half-way":  # ends while nobody watches
            wait_until("it ends alone", lambda: ended(place))
        place.unlock()
        code, said = place.run()
        return moment, code, said, place

    with ThreadPoolExecutor(3) as pool:
        return {moment: (code, said, place) for moment, code, said, place in pool.map(one, MOMENTS)}


ATTACHED, ADOPTED, RECORDED = (
    "re-attached to the running gang",
    "adopted, it has already ended",
    "Nothing to be done",
)
# What the second controller finds. Before the Job is made there is nothing, and a moment later there may be.
FOUND = {
    "job-created": (ATTACHED,),
    "pods-created": (ATTACHED,),
    "running": (ATTACHED,),
    "half-way": (ADOPTED,),
    "output-there": (ATTACHED, ADOPTED),
    "ended": (ADOPTED, RECORDED),
    "deleting": (ADOPTED, RECORDED),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_controller_killed_at_any_moment_loses_nothing(killed, moment):
    code, said, place = killed[moment]
    assert code == 0, said
    assert (place.path / "out/done.txt").read_text() == "finished\n"
    assert runs(place) == 1, f"computed once: {said}"
    assert any(text in said for text in FOUND.get(moment, [""])), said


SCRIPT = 'import time\nopen("runs", "a").write("started\\n")\ntime.sleep(12)\nopen(snakemake.output[0], "w").write("a")\n'


def test_a_script_is_taken_up_again(workdir):
    """A Snakemake of its own runs it in the pod."""
    place = workdir('rule b:\n    output: "b.txt"\n    script: "b.py"\n')
    place.write("b.py", SCRIPT)
    first = place.start()
    wait_until("it runs", lambda: runs(place))
    kill(first)
    place.unlock()
    code, said = place.run()
    assert code == 0, said
    assert ATTACHED in said
    assert runs(place) == 1
    assert (place.path / "b.txt").exists()


def test_a_changed_command_replaces_the_gang(workdir):
    place = workdir(counting(60))
    first = place.start()
    wait_until("it runs", lambda: runs(place))
    old = place.objects("jobs")[0]["metadata"]["uid"]
    kill(first)
    place.unlock()
    place.write("Snakefile", counting(4))
    (place.path / "checkpoint").unlink(missing_ok=True)
    second = place.start()
    new = wait_until("a new job", lambda: [j for j in place.objects("jobs") if j["metadata"]["uid"] != old])
    assert second.wait(60) == 0, place.said()
    assert "is replaced: its command, image or inputs have changed" in place.said()
    live = [p for p in place.objects("pods") if p["metadata"]["ownerReferences"][0]["uid"] == old]
    assert new
    assert not live, "the old gang's pods were gone before the new one's came"


def test_another_volume_makes_no_second_writer(workdir):
    place = workdir(counting(12))
    first = place.start()
    wait_until("it runs", lambda: runs(place))
    kill(first)
    place.unlock()
    mine = f"{harness.CLAIM}:{harness.volume()}"
    code, said = place.run("--kubernetes-gang-volumes", mine, f"{harness.CLAIM}:/srv")
    assert code == 0, said
    assert "re-attached to the running gang" in said
    assert runs(place) == 1


def test_a_group_of_jobs_is_taken_up_again(workdir):
    """A Snakemake in the pod runs it."""
    rule = 'rule {0}:\n    output: "{0}.txt"\n    group: "both"\n    shell: "echo {0} >> runs; sleep 8; touch {{output}}"\n'
    place = workdir('rule all:\n    input: "a.txt", "b.txt"\n' + rule.format("a") + rule.format("b"))
    first = place.start()
    wait_until("it runs", lambda: runs(place), limit_s=90)
    kill(first)
    place.unlock()
    code, said = place.run()
    assert code == 0, said
    assert "re-attached to the running gang" in said
    assert runs(place) == 2


def test_a_changed_input_replaces_the_gang(workdir):
    snakefile = 'rule copy:\n    input: "in.txt"\n    output: "done.txt"\n    shell: "echo started >> runs; sleep 4; cp {input} {output}"\n'
    place = workdir(snakefile)
    place.write("in.txt", "old")
    first = place.start()
    wait_until("it runs", lambda: runs(place))
    kill(first)
    place.unlock()
    place.write("in.txt", "new")
    code, said = place.run()
    assert code == 0, said
    assert (place.path / "done.txt").read_text() == "new"
    assert runs(place) == 2


def test_ctrl_c_without_a_terminal_leaves_the_gang_and_it_is_adopted(workdir):
    place = workdir(counting(8))
    first = place.start()
    wait_until("it runs", lambda: runs(place))
    os.kill(first.pid, signal.SIGINT)
    assert first.wait(60) != 0
    assert "left running: count-" in place.said()
    wait_until("it ends alone", lambda: ended(place))
    code, said = place.run()
    assert code == 0, said
    assert "adopted" in said
    assert runs(place) == 1


def test_a_gang_that_ends_while_snakemake_is_shutting_down_is_adopted(workdir):
    place = workdir(counting(8))
    first = place.start()
    wait_until("it runs", lambda: runs(place))
    os.kill(first.pid, signal.SIGINT)
    wait_until("it shuts down", lambda: "left running: count-" in place.said(), every_s=0.02)
    os.kill(first.pid, signal.SIGSTOP)  # in the middle of it, for as long as the gang takes
    assert first.poll() is None
    wait_until("the gang ends", lambda: ended(place))
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(60) != 0
    code, said = place.run()
    assert code == 0, said
    assert ADOPTED in said
    assert runs(place) == 1


def take_terminal() -> None:
    """Make standard input the terminal that controls this process."""
    harness.heed_signals()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal_that_goes_away_leaves_the_gang_and_it_is_taken_up_again(workdir):
    """As when a connection is lost: the kernel sends SIGHUP, there is nobody to ask, and no lock is left."""
    place = workdir(counting(12))
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        place.command(),
        cwd=place.path,
        env=place.environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(terminal)
    wait_until("it runs", lambda: _read(controller) and runs(place))
    os.close(controller)
    assert process.wait(60) != 0
    assert not ended(place), "the gang runs on"
    assert place.objects("jobs")
    code, said = place.run()
    assert code == 0, said
    assert "re-attached to the running gang" in said
    assert runs(place) == 1


def test_ctrl_c_cancels_where_this_is_set(workdir):
    place = workdir(counting(60))
    first = place.start("--kubernetes-gang-on-exit", "cancel")
    wait_until("it runs", lambda: runs(place))
    os.kill(first.pid, signal.SIGINT)
    assert first.wait(60) != 0
    wait_until("nothing is left", lambda: not place.objects("jobs,pods"))


def test_ctrl_c_at_a_terminal_asks(workdir):
    place = workdir(counting(60))
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        place.command(),
        cwd=place.path,
        env=place.environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=harness.heed_signals,
    )
    os.close(terminal)
    wait_until("it runs", lambda: _read(controller) and runs(place))
    os.kill(process.pid, signal.SIGINT)
    said = ""
    until = time.monotonic() + 30
    while "ancel them" not in said and time.monotonic() < until:
        said += _read(controller)
    assert "ancel them" in said
    os.write(controller, b"c\n")
    wait_until("it ends", lambda: (_read(controller) or True) and process.poll() is not None)
    wait_until("nothing is left", lambda: not place.objects("jobs,pods"))


def _read(terminal: int) -> str:
    """What the terminal shows; a space if nothing."""
    ready, _, _ = select.select([terminal], [], [], 0.1)
    try:
        return os.read(terminal, 65536).decode(errors="replace") if ready else " "
    except OSError:
        return " "


def test_a_failed_rank_ends_its_gang_and_the_retry_goes_on_from_the_checkpoint(workdir):
    text = counting(5, nodes=2, retries=1).replace(
        "echo step $n;", "echo step $n; [ $n != 3 -o -e failed ] || {{ touch failed; exit 7; }};"
    )
    place = workdir(text)
    code, said = place.run()
    assert code == 0, said
    assert "exit code 7" in said
    assert "tried again (attempt 2 of 2)" in said
    assert runs(place) == 2
    assert said.count("step 2\n") == 1, "the second attempt began after the checkpoint"


def test_gc_removes_what_nobody_waits_for_and_nothing_else(workdir):
    place = workdir(counting(4))
    process = place.start()
    wait_until("it runs", lambda: runs(place))
    kill(process)
    place.unlock()
    running = workdir(counting(60))
    other = running.start()
    wait_until("the other runs", lambda: runs(running))
    wait_until("it ends alone", lambda: ended(place))
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "left", "labels": {"app.kubernetes.io/managed-by": "kubernetes-gang"}},
        "spec": {"clusterIP": "None", "selector": {"x": "y"}},
    }
    harness.kubectl("apply", "-n", harness.NAMESPACE, "-f", "-", given=service)
    command = [sys.executable, "-m", "snakemake_executor_plugin_kubernetes_gang", "gc", "--hours", "0"]
    environment = place.environment()  # with the rights of k8s/base, no administrator's
    shown = subprocess.run(command, env=environment, input="n\n", capture_output=True, text=True, check=True)
    assert "may not be listed" not in shown.stderr
    assert "has succeeded" in shown.stdout
    assert "Service left: belongs to no gang" in shown.stdout
    assert place.objects("jobs"), "it asks first"
    subprocess.run([*command, "--yes"], env=environment, capture_output=True, check=True)
    wait_until("they are gone", lambda: not place.objects("jobs"))
    assert not [s for s in harness.get("services") if s["metadata"]["name"] == "left"]
    assert running.objects("jobs"), "a running gang is not touched"
    kill(other)
