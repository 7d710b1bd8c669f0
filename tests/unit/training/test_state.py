from __future__ import annotations

from rlhf.training.state import State


def test_the_newest_state_is_that_of_the_most_steps(tmp_path):
    for step in ("step-999999", "step-1000000", "step-000200"):
        (tmp_path / step).mkdir()
    names = [path.name for path in State(tmp_path, {})._states()]
    assert names == ["step-1000000", "step-999999", "step-000200"]
