from __future__ import annotations

from itertools import combinations

from rlhf.data.streams import Purpose, rng, seed_of


def test_no_two_purposes_share_a_stream():
    streams = {}
    for purpose in Purpose:
        for numbers in ((), (0,), (1,), (1, 1)):
            streams[purpose, numbers] = tuple(rng(7, purpose, *numbers).integers(2**63, size=2))
    assert all(a != b for (k, a), (m, b) in combinations(streams.items(), 2) if k[0] != m[0])


def test_a_seed_decides_a_stream():
    draws = [tuple(rng(seed, Purpose.ROLLOUT, 3).integers(2**63, size=2)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    states = [seed_of(seed, Purpose.HEAD) for seed in (1, 1, 2)]
    assert states[0] == states[1] != states[2]
