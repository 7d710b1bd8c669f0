from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snakemake_executor_plugin_kubernetes_gang import logs

S = "2026-01-01T00:00:0{}.000000000Z"


@given(st.lists(st.integers(0, 5), max_size=30).map(sorted), st.data())
def test_streams_that_break_anywhere_give_every_line_once(seconds, data):
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


def test_a_controller_that_starts_again_goes_on_where_the_file_ends(tmp_path):
    path = tmp_path / "rank-0.log"
    path.write_text(f"{S.format(1)} a\n{S.format(2)} b\n{S.format(2)} c\n{S.format(3)} half a li")
    position = logs.resume(path)
    assert (position.stamp, position.count) == (S.format(2), 2)
    assert path.read_text().endswith("c\n"), "half a line is cut off: it comes again"


def test_a_stored_log_without_its_stamps():
    assert logs.without_stamps(f"{S.format(1)} a b\n{S.format(2)} \n".encode()) == b"a b\n\n"


class OneLog:
    """A cluster with one pod whose log is there as a whole."""

    def __init__(self, text):
        self.text, self.asked = text, []

    def log(self, pod, container, **query):
        self.asked.append(query)
        return self

    def stream(self, **_):
        yield self.text

    def close(self):
        pass


def test_a_log_that_was_not_streamed_comes_with_one_request(tmp_path):
    cluster, shown, path = OneLog(f"{S.format(1)} a\n{S.format(2)} b\n".encode()), [], tmp_path / "log"
    logs.Follower(cluster, {"metadata": {"name": "one"}}, path, shown.append).end()
    assert shown == ["a", "b"]
    assert cluster.asked == [{"timestamps": "true"}]
    assert logs.end_of(path) == "a\nb\n"
