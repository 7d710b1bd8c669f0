from __future__ import annotations

import errno
import io
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snakemake_executor_plugin_kubernetes_gang import logs, ranklogs
from snakemake_executor_plugin_kubernetes_gang.cluster import ApiError, Unreachable
from snakemake_executor_plugin_kubernetes_gang.objects import INDEX_LABEL

S = "2026-01-01T00:00:0{}.000000000Z"


@given(st.lists(st.integers(0, 5), max_size=30).map(sorted), st.data())
def test_streams_that_break_anywhere_return_every_line_once(seconds, data):
    """Each stream begins with the second in which the last one broke, as the API cuts `sinceTime`."""
    lines = [(S.format(second), n) for n, second in enumerate(seconds)]
    position, read, done = logs.Position(), [], 0
    while done < len(lines):
        stop = data.draw(st.integers(done + 1, len(lines)))
        since = position.rewind().get("sinceTime", "")
        for stamp, n in [line for line in lines[:stop] if line[0] >= since]:
            if position.is_new(stamp):
                read.append(n)
        done = stop
    assert read == list(range(len(lines)))


def test_a_restarted_controller_resumes_at_the_end_of_the_file(tmp_path):
    path = tmp_path / "rank-0.log"
    path.write_text(f"{S.format(1)} a\n{S.format(2)} b\n{S.format(2)} c\n{S.format(3)} half a li")
    position = logs.resume(path)
    assert (position.stamp, position.count) == (S.format(2), 2)
    assert path.read_text().endswith("c\n"), "an incomplete line is removed, because it is sent again"


def test_a_stored_log_without_its_stamps():
    assert logs.without_stamps(f"{S.format(1)} a b\n{S.format(2)} \n".encode()) == b"a b\n\n"


def test_a_clock_that_is_set_back_loses_no_line():
    position = logs.Position()
    assert [position.is_new(S.format(second)) for second in (5, 2, 3, 3, 6)] == [True] * 5
    position.rewind()
    assert not position.is_new(S.format(5)), "after a reconnect, lines are repeated"
    assert not position.is_new(S.format(6))
    assert position.is_new(S.format(7))


class Log:
    """A cluster with one pod. Each request for its log gets the next response: text, or an error to raise."""

    is_down = False

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []

    def log(self, pod, container, **query):
        self.requests.append(query)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return Answer(answer)


class Answer:
    def __init__(self, text):
        self.text = text

    def stream(self, **_):
        yield self.text

    def close(self):
        pass


def pod(rank=0, uid="", **end):
    state = {"terminated": {"startedAt": "2026-01-01T00:00:00Z", **end}} if end else {"running": {}}
    labels = {INDEX_LABEL: str(rank)}
    return {
        "metadata": {"name": "one", "uid": uid or f"pod-{rank}", "labels": labels},
        "status": {"containerStatuses": [{"name": "main", "state": state}]},
    }


GONE = ApiError(404, "NotFound", 'pods "one" not stored')
# The API server's response if a kubelet does not know its pods yet.
NOT_YET = ApiError(404, "NotFound", "the server could not find the requested resource ( pods/log one)")
TWO_LINES = f"{S.format(1)} a\n{S.format(2)} b\n".encode()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(logs, "REOPEN_S", 0.01)
    monkeypatch.setattr(logs, "STUCK_S", 1.0)


def rank_logs(cluster, tmp_path, shown=None):
    return ranklogs.RankLogs(cluster, tmp_path, "0123456789", (shown if shown is not None else []).append)


def collected(stored, pods, limit_s=10.0):
    until = time.monotonic() + limit_s
    while not (done := stored.collect(pods, 0.1)) and time.monotonic() < until:
        time.sleep(0.05)
    return done


def test_a_log_that_was_not_streamed_takes_one_request(tmp_path):
    cluster, shown, ended = Log(TWO_LINES), [], [pod(exitCode=0)]
    stored = rank_logs(cluster, tmp_path, shown)
    assert stored.collect(ended, 5.0)
    assert shown == ["a", "b"]
    assert cluster.requests == [{"timestamps": "true"}]
    assert stored.tails(ended) == {0: "a\nb\n"}
    assert stored.read(ended[0]) == b"a\nb\n"
    assert not stored.incomplete(ended)


def test_only_the_end_of_other_ranks_is_stored_and_it_is_not_shown(tmp_path):
    cluster, shown, ended = Log(TWO_LINES), [], [pod(1, exitCode=1)]
    stored = rank_logs(cluster, tmp_path, shown)
    assert stored.collect(ended, 5.0)
    assert cluster.requests == [{"timestamps": "true", "tailLines": logs.TAIL_LINES}]
    assert shown == []
    assert [path.rpartition("/")[2] for path in stored.files()] == ["01234567.rank-1.log"]


def test_a_log_is_kept_although_its_pod_is_deleted(tmp_path, quick):
    """After another rank failed, the Job deletes this rank's pod before it reports its own failure."""
    stored, ended = rank_logs(Log(TWO_LINES, GONE), tmp_path), [pod(1, exitCode=143, message="b")]
    stored.save([pod(1)])
    time.sleep(0.1)
    assert collected(stored, ended)
    assert stored.tails(ended) == {1: "a\nb\n"}
    assert not stored.incomplete(ended)


@pytest.mark.parametrize(
    "answer",
    [
        NOT_YET,
        ApiError(400, "BadRequest", "container is waiting to start"),
        b"unable to retrieve container logs for containerd://2f",
    ],
)
def test_a_kubelet_that_cannot_answer_yet_is_retried(tmp_path, quick, answer):
    stored = rank_logs(Log(answer, TWO_LINES), tmp_path)
    stored.save([pod()])
    time.sleep(0.1)
    ended = [pod(exitCode=0)]
    assert collected(stored, ended)
    assert stored.read(ended[0]) == b"a\nb\n"
    assert not stored.incomplete(ended)


def test_a_log_that_cannot_be_read_is_incomplete_and_the_termination_message_is_kept(tmp_path, quick):
    stored, ended = rank_logs(Log(NOT_YET), tmp_path), [pod(1, exitCode=1, message="KeyError: 'x'")]
    assert not stored.collect(ended, 0.2), "no log is given up at the first try"
    assert collected(stored, ended)
    assert stored.incomplete(ended) == [1]
    assert stored.tails(ended) == {1: "KeyError: 'x'"}


def test_no_log_is_given_up_during_an_outage_of_the_api(tmp_path, quick):
    cluster = Log(Unreachable("no route"))
    cluster.is_down = True
    stored, ended = rank_logs(cluster, tmp_path), [pod(exitCode=0)]
    assert not collected(stored, ended, limit_s=2.0), "twice as long as for a node that does not respond"
    cluster.is_down, cluster.answers = False, [TWO_LINES]
    assert collected(stored, ended)
    assert stored.read(ended[0]) == b"a\nb\n"
    assert not stored.incomplete(ended)


def test_a_node_that_has_lost_the_log_is_not_waited_for_forever(tmp_path, quick):
    """For example that of an evicted pod: each response is an error message instead of the log."""
    stored = rank_logs(Log(TWO_LINES, b"unable to retrieve container logs for containerd://2f"), tmp_path)
    stored.save([pod()])
    time.sleep(0.2)
    assert collected(stored, [pod(exitCode=1)], limit_s=5.0)
    assert not stored.incomplete([pod(exitCode=1)]), "a stream has ended normally before"


class Limited(io.FileIO):
    """A file on a volume that has room for a few bytes; the last write that has some is short."""

    room = 0

    def write(self, data):
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(data[: self.room])
        self.room -= written
        return written


class OnFullVolume(type(Path())):
    def open(self, mode="r", *options, **named):
        return Limited(self, mode) if mode == "ab" else super().open(mode, *options, **named)


@pytest.mark.parametrize("room", [0, 30, 40])
def test_a_full_volume_cuts_the_log_says_so_once_and_holds_nothing_up(tmp_path, quick, monkeypatch, room):
    monkeypatch.setattr(Limited, "room", room)
    monkeypatch.setattr(ranklogs.RankLogs, "_path", lambda self, pod: OnFullVolume(tmp_path / "log"))
    lines = TWO_LINES + TWO_LINES.replace(b"00Z", b"09Z").replace(b" a", b" c").replace(
        b" b", b" ValueError: d"
    )
    shown, ended = [], [pod(exitCode=1)]
    stored = rank_logs(Log(lines), tmp_path, shown)
    assert stored.collect(ended, 5.0)
    warnings = [line for line in shown if "is cut" in line]
    assert len(warnings) == 1
    assert "No space left on device): free space" in warnings[0]
    assert [line for line in shown if line not in warnings] == ["a", "b", "c", "ValueError: d"]
    assert stored.incomplete(ended) == [0]
    assert stored.tails(ended)[0].endswith("ValueError: d\n"), "the cause is known although it is not stored"


def test_a_log_that_cannot_be_opened_is_shown(tmp_path, quick):
    (tmp_path / "01234567.rank-0.log").mkdir()
    shown, ended = [], [pod(exitCode=0)]
    stored = rank_logs(Log(TWO_LINES), tmp_path, shown)
    assert stored.collect(ended, 5.0)
    assert shown[1:] == ["a", "b"]
    assert "is cut" in shown[0]
