from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data.splits import EVAL, position, stage_of

STAGES = ("sft", "reward", "rlhf")
parts = st.fixed_dictionaries({stage: st.floats(0.05, 20) for stage in STAGES})
evals = st.floats(0.02, 0.9)
groups = st.text(max_size=20)


@settings(max_examples=25)
@given(parts, evals, st.integers(0, 10**6))
def test_shares_are_kept_but_for_chance(shares, eval_share, salt):
    count = 3000
    found = Counter(stage_of(f"{salt}-{i}", shares, eval_share) for i in range(count))
    whole = sum(shares.values())
    expected = {s: (1 - eval_share) * part / whole for s, part in shares.items()} | {EVAL: eval_share}
    for stage, share in expected.items():
        sd = (share * (1 - share) / count) ** 0.5
        assert abs(found[stage] / count - share) < 6 * sd + 1 / count


@given(st.lists(groups, min_size=1), parts, evals, st.randoms())
def test_a_group_has_one_stage_in_any_order_and_company(names, shares, eval_share, random):
    alone = {name: stage_of(name, shares, eval_share) for name in names}
    shuffled = random.sample(names * 2, len(names) * 2)
    assert all(stage_of(name, shares, eval_share) == alone[name] for name in shuffled)
    assert set(alone.values()) <= {*STAGES, EVAL}


@given(groups, parts, evals)
def test_the_order_of_shares_does_not_matter(name, shares, eval_share):
    assert stage_of(name, shares, eval_share) == stage_of(name, dict(reversed(shares.items())), eval_share)


@given(groups, parts, evals, st.sampled_from([0.25, 2, 1024]))
def test_only_proportions_of_shares_matter(name, shares, eval_share, factor):
    scaled = {stage: part * factor for stage, part in shares.items()}
    assert stage_of(name, shares, eval_share) == stage_of(name, scaled, eval_share)


@given(groups, parts, parts, evals)
def test_other_shares_hold_out_the_same_groups(name, one, two, eval_share):
    assert (stage_of(name, one, eval_share) == EVAL) == (stage_of(name, two, eval_share) == EVAL)


@given(groups, parts, evals, evals)
def test_a_larger_held_out_part_contains_the_smaller_one(name, shares, one, two):
    small, large = sorted((one, two))
    if stage_of(name, shares, small) == EVAL:
        assert stage_of(name, shares, large) == EVAL


@given(groups)
def test_a_place_is_in_the_unit_interval(name):
    assert 0 <= position(name) <= 1


@pytest.mark.parametrize("where", [0.0, 0.1, 0.999999999999, 1 - 2**-53, 1.0])
def test_the_ends_of_the_interval_have_a_stage(monkeypatch, where):
    monkeypatch.setattr("rlhf.data.splits.position", lambda group: where)
    assert stage_of("x", {"sft": 1 / 3, "reward": 0.1, "rlhf": 0.7}, 0.1) in {*STAGES, EVAL}
