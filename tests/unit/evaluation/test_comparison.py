from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import files
from rlhf.evaluation import comparison


def rows(before, after):
    return [
        {
            when: {"judged": judged, "words": words, "score": 2 * judged}
            for when, (judged, words) in both.items()
        }
        for both in ({"before": b, "after": a} for b, a in zip(before, after, strict=True))
    ]


def test_wins_and_losses_add_up_to_one():
    before, after = [(0.1, 1), (0.2, 1), (0.3, 1), (0.4, 1)], [(0.5, 1), (0.2, 1), (0.1, 1), (0.6, 1)]
    won = comparison.win_rate(rows(before, after), "judged")
    assert won == 2.5 / 4
    assert won + comparison.win_rate(rows(after, before), "judged") == 1
    assert won == comparison.win_rate(rows(before, after), "score")


def test_a_judge_of_length_alone_sees_nothing_at_matched_length():
    before = [(0.1 * n, n) for n in (1, 2, 2, 3, 5)]
    after = [(0.1 * n, n) for n in (1, 2, 3, 5, 5)]
    figures = comparison.matched_length(rows(before, after))
    expected = 0.1 * (1 + 2 + 2 + 3 + 5) / 5
    assert [figures[name] for name in MEANS] == pytest.approx([expected, expected])


MEANS = ("judged_matched_length_before", "judged_matched_length_after")
responses = st.tuples(st.sampled_from([-0.5, 0.0, 0.25, 1.0]), st.integers(0, 4))
quick = settings(max_examples=60)


@quick
@given(pairs=st.lists(st.tuples(responses, responses), min_size=1), rng=st.randoms())
def test_the_same_responses_in_another_order_have_the_same_mean_at_matched_length(pairs, rng):
    before = [first for first, _ in pairs]
    figures = comparison.matched_length(rows(before, rng.sample(before, len(before))))
    mean = sum(judged for judged, _ in before) / len(before)
    assert [figures[name] for name in MEANS] == pytest.approx([mean, mean])
    assert figures["in_common_before"] == figures["in_common_after"] == 1


@quick
@given(pairs=st.lists(st.tuples(responses, responses), min_size=1), odd=responses)
def test_lengths_that_one_side_alone_has_are_left_out_on_both(pairs, odd):
    before, after = [first for first, _ in pairs], [second for _, second in pairs]
    figures = comparison.matched_length(rows(before, after))
    odd_before, odd_after = [(odd[0], 8 + odd[1])], [(odd[0], 16 + odd[1])]
    more = comparison.matched_length(rows(before + odd_before, after + odd_after))
    for name, value in figures.items():
        share = len(pairs) / (len(pairs) + 1) if name.startswith("in_common") else 1
        assert more[name] == (None if value is None else pytest.approx(value * share))


def test_a_word_count_that_only_responses_before_have_counts_in_no_mean():
    figures = comparison.matched_length(rows([(0.2, 3), (-1.0, 0)], [(0.2, 3), (0.2, 3)]))
    assert figures == {
        "judged_matched_length_before": 0.2,
        "judged_matched_length_after": 0.2,
        "in_common_before": 0.5,
        "in_common_after": 1.0,
    }


def test_without_a_common_word_count_the_summary_is_json_and_the_table_has_a_dash(tmp_path):
    row = {
        when: {"judged": 0.5, "words": words, "score": 1.0, "kl": 0.1, "response": "a"}
        for when, words in (("before", 1), ("after", 2))
    }
    figures = comparison.summary([{"prompt": "p", **row}])
    files.write_json(tmp_path / "summary.json", figures)
    assert "NaN" not in (tmp_path / "summary.json").read_text()
    assert figures["judged_matched_length_after"] is None
    (line,) = [
        x
        for x in comparison.table([{"prompt": "p", **row}], figures).splitlines()
        if x.startswith("judged_matched_length ")
    ] or [""]
    assert line.split()[1:] == ["-", "-"]
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "other.json", float("nan"))


def test_bigrams_that_repeat_count_once():
    assert comparison.distinct_bigrams(["a b c", "d e"]) == 1
    assert comparison.distinct_bigrams(["a b a b", "a b"]) == 2 / 4
    assert comparison.distinct_bigrams(["one", ""]) == 0
