"""What `auto` chooses: it fits, it is the fastest that does, and what is said explicitly stays."""

from __future__ import annotations

import families
import pytest
import trainings
from hypothesis import given
from hypothesis import strategies as st

from rlhf.training import fit

ROWS, TOKENS = 12, 1200  # of a batch, of a row


def chosen(monkeypatch, available, **run):
    """Return how SFT would run in so much memory, and the bytes that it would need."""
    monkeypatch.setattr(fit, "usable_bytes", lambda _: available)
    auto = {"micro_batch_size": "auto", "gradient_checkpointing": "auto"}
    config = trainings.settings("sft", {"train_batch_size": ROWS, "run": auto | run})
    model = families.tiny("opt")
    found = fit.fitted_training(model, config, longest=TOKENS, mean=TOKENS).run
    size = fit.size_of(model, found, trained=True)
    fixed = size.weights + size.training + fit.logits_bytes(model)
    tokens = TOKENS * found.micro_batch_size
    return found, fixed + size.activations(tokens, recomputed=found.gradient_checkpointing)


@pytest.fixture(scope="module")
def everything():
    """Bytes that are needed where all rows are one micro-batch and nothing is recomputed."""
    with pytest.MonkeyPatch.context() as patch:
        return chosen(patch, 10**15)[1]


def test_with_plenty_of_memory_all_rows_are_one_micro_batch_and_nothing_is_recomputed(monkeypatch):
    run, _ = chosen(monkeypatch, 10**15)
    assert (run.micro_batch_size, run.gradient_checkpointing) == (ROWS, False)


@given(share=st.floats(0.2, 1))
def test_what_is_chosen_fits_and_divides_the_batch(share, everything):
    with pytest.MonkeyPatch.context() as patch:
        run, need = chosen(patch, int(share * everything))
        assert ROWS % run.micro_batch_size == 0
        assert need <= share * everything or (run.micro_batch_size, run.gradient_checkpointing) == (1, True)


def test_more_memory_never_leads_to_smaller_micro_batches_in_one_way(monkeypatch, everything):
    found = [chosen(monkeypatch, int(everything * share / 20))[0] for share in range(1, 21)]
    for recomputed in (False, True):
        sizes = [run.micro_batch_size for run in found if run.gradient_checkpointing is recomputed]
        assert sizes == sorted(sizes)
    assert len({(run.micro_batch_size, run.gradient_checkpointing) for run in found}) > 2


def test_too_little_memory_is_said(monkeypatch, caplog):
    caplog.set_level("INFO")
    run, _ = chosen(monkeypatch, 1)
    assert (run.micro_batch_size, run.gradient_checkpointing) == (1, True)
    assert "it may not fit" in caplog.text


@pytest.mark.parametrize("explicit", [{"micro_batch_size": 4}, {"gradient_checkpointing": False}])
def test_what_is_explicit_stays(monkeypatch, explicit):
    run, _ = chosen(monkeypatch, 1, **explicit)
    for name, value in explicit.items():
        assert getattr(run, name) == value


def test_a_sampler_gets_all_rows_or_what_its_cache_leaves_room_for(monkeypatch):
    auto = {"micro_batch_size": "auto", "gradient_checkpointing": "auto", "generation_batch_size": "auto"}
    config = trainings.settings("rlhf", {"run": auto})
    models = [families.tiny("opt") for _ in range(3)]
    sizes = []
    for available in (1, 8 * 10**6, 10**12):
        monkeypatch.setattr(fit, "usable_bytes", lambda _, bytes=available: bytes)
        sizes.append(fit.fitted_rlhf(models[:2], models[2:], config).run.generation_batch_size)
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, config.rollout_batch_size)
