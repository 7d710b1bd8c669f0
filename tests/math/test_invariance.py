from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import trainings
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rlhf.data.tokens import Padded, pad, response_labels
from rlhf.errors import DataError
from rlhf.models import loading, outputs
from rlhf.training import reward, sft, supervised
from rlhf.training.wrapped import SingleForward

PAD = 1
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _no_gradients_left(actor, scorer):
    yield
    for model in (actor, scorer):
        model.zero_grad(set_to_none=True)


@pytest.fixture(scope="module")
def scorer(actor_path):
    return loading.new_scorer(actor_path, torch.float32, PAD, seed=3).eval()


def widened(batch, left=0, right=0, fill=PAD):
    """Return a batch with more padding, of any token."""
    grow = (left, right)
    return Padded(
        torch.nn.functional.pad(batch.ids, grow, value=fill), torch.nn.functional.pad(batch.mask, grow)
    )


def ending(batch, length):
    """Return labels that are True on the last `length` tokens of every row."""
    labels = torch.zeros_like(batch.mask)
    labels[:, -length:] = True
    return labels


def response_logprobs(model, batch, length):
    """Return (B, length) log-probabilities of the last tokens of every row."""
    with torch.no_grad():
        return outputs.response_logprobs(model, batch, ending(batch, length)).view(-1, length)


def test_more_padding_on_the_left_changes_no_response(actor, sequences):
    batch = pad(sequences(9, 14, 11), PAD, side="left")
    plain = response_logprobs(actor, batch, 5)
    for left, fill in ((1, PAD), (7, PAD), (20, 33)):
        close(response_logprobs(actor, widened(batch, left, fill=fill), 5), plain, atol=1e-4, rtol=1e-4)


def test_the_rest_of_the_batch_changes_no_response(actor, sequences):
    several = sequences(9, 14, 11, 20)
    together = response_logprobs(actor, pad(several, PAD, side="left"), 5)
    for i, one in enumerate(several):
        alone = response_logprobs(actor, pad([one], PAD, side="left"), 5)
        close(alone[0], together[i], atol=1e-4, rtol=1e-4)


def test_what_follows_a_token_does_not_change_it(actor, sequences):
    batch = pad(sequences(12, 12), PAD, side="left")
    other = Padded(batch.ids.clone(), batch.mask)
    other.ids[:, -1] = 40
    close(response_logprobs(actor, batch, 6)[:, :-1], response_logprobs(actor, other, 6)[:, :-1])


def test_temperature_divides_logits(actor, sequences):
    batch = pad(sequences(9, 14), PAD, side="left")
    with torch.no_grad():
        one, two = (outputs.response_logits(actor, batch, ending(batch, 4), t) for t in (1.0, 2.0))
    close(one, 2 * two)


def test_logprobs_where_labels_are_equal_those_of_each_token(actor, sequences):
    several, prompts = sequences(9, 14, 6), [3, 5, 1]
    batch = pad(several, PAD, side="right")
    labels = response_labels(prompts, batch)
    with torch.no_grad():
        picked = outputs.response_logprobs(actor, batch, labels)
    expected = [
        response_logprobs(actor, pad([one], PAD, side="left"), len(one) - n)[0]
        for one, n in zip(several, prompts, strict=True)
    ]
    close(picked, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_compact_rows_hold_the_same_tokens_in_order_and_no_padding_but_on_the_right(sequences):
    several = sequences(9, 3, 6)
    left = pad(several, PAD, side="left")
    holes = Padded(torch.cat([left.ids, left.ids], 1), torch.cat([left.mask, left.mask], 1))  # padding within
    for batch, rows in ((left, several), (holes, [np.concatenate([s, s]) for s in several])):
        found, expected = batch.compact(), pad(rows, PAD, side="right")
        assert torch.equal(found.mask, expected.mask)
        assert torch.equal(found.ids[found.mask], expected.ids[expected.mask])


def test_labels_are_true_on_responses_alone(sequences):
    batch = pad(sequences(9, 14, 6), PAD, side="right")
    labels = response_labels([3, 5, 1], batch)
    assert labels.sum(-1).tolist() == [6, 9, 5]
    assert not (labels & ~batch.mask).any()


def test_probabilities_add_up_to_one(actor, sequences):
    with torch.no_grad():
        logits = outputs.response_logits(
            actor, batch := pad(sequences(8), PAD, side="left"), ending(batch, 1)
        )
    logprobs = outputs.token_logprobs(logits.expand(64, -1), torch.arange(64))
    close(logprobs.exp().sum(), torch.tensor(1.0))


def gradients(model, task, rows, parts):
    """Return the gradients of a batch that is divided into micro-batches."""
    model = copy.deepcopy(model)
    terms = task.terms(rows)
    for part in np.array_split(np.arange(len(rows)), parts):
        (trainings.loss(task, model, [rows[i] for i in part]) / terms).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_logits_in_chunks_give_the_same_gradients_and_are_never_all_there(actor, sequences, monkeypatch):
    rows = list(zip(sequences(5, 9, 3, 7), sequences(4, 6, 8, 2), strict=True))
    whole = gradients(actor, sft.task(PAD), rows, 1)
    sizes, head = [], actor.get_output_embeddings()
    watch = head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    monkeypatch.setattr(outputs, "LOGITS", 6)
    with torch.no_grad():
        one = trainings.loss(sft.task(PAD), actor, rows)
    watch.remove()
    assert sizes == [6, 6, 6, 2]
    close(one, trainings.loss(sft.task(PAD), actor, rows).detach())
    for name, gradient in gradients(actor, sft.task(PAD), rows, 1).items():
        close(gradient, whole[name])


@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_any_number_of_micro_batches_gives_one_gradient(actor, scorer, sequences, stage, parts):
    draw = np.random.default_rng(1)
    columns = [sequences(*draw.integers(2, 15, 8), seed=s) for s in range(3)]
    rows = [list(row) for row in zip(*columns[: 2 if stage == "sft" else 3], strict=True)]
    model, task = (actor, sft.task(PAD)) if stage == "sft" else (scorer, reward.task(PAD))
    whole, divided = gradients(model, task, rows, 1), gradients(model, task, rows, parts)
    assert whole.keys() == divided.keys()
    for name, gradient in whole.items():
        close(divided[name], gradient, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_the_prompt_is_not_learned(actor, sequences):
    """A longer response adds terms, a longer prompt none."""
    prompt, more, response = sequences(4, 9, 5)
    task = sft.task(PAD)
    assert task.terms([[prompt, response]]) == task.terms([[more, response]]) == 5
    batch = pad([np.concatenate([prompt, response])], PAD, side="left")
    with torch.no_grad():
        loss = trainings.loss(task, actor, [[prompt, response]])
    close(loss, -response_logprobs(actor, batch, 5).sum(), atol=1e-4, rtol=1e-4)


def test_swapped_responses_reverse_the_margin(scorer, sequences):
    prompt, better, worse = sequences(4, 9, 5)
    task = reward.task(PAD)
    with torch.no_grad():
        one = supervised.measure(task, SingleForward(scorer), [[prompt, better, worse]], 1)
        two = supervised.measure(task, SingleForward(scorer), [[prompt, worse, better]], 1)
    assert one["eval_margin"] == pytest.approx(-two["eval_margin"], abs=1e-5)
    assert one["eval_accuracy"] + two["eval_accuracy"] == 1
    assert one["eval_margin"] == pytest.approx(two["eval_loss"] - one["eval_loss"], abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_transformers_own_forward(scorer, actor_path, sequences, tmp_path, side):
    scorer.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = pad(sequences(9, 14, 6, 1), PAD, side=side)
    with torch.no_grad():
        expected = theirs(input_ids=batch.ids, attention_mask=batch.mask.long()).logits[:, 0]
        close(outputs.scores(scorer, batch), expected, atol=1e-4, rtol=1e-4)
        close(
            outputs.scores(loading.load_scorer(tmp_path, torch.float32).eval(), batch),
            expected,
            atol=1e-4,
            rtol=1e-4,
        )


def test_scores_do_not_depend_on_the_side_or_width_of_padding(scorer, sequences):
    several = sequences(9, 14, 6)
    left, right = (pad(several, PAD, side=side) for side in ("left", "right"))
    with torch.no_grad():
        expected = outputs.scores(scorer, right)
        for batch in (left, widened(left, 3, 4), widened(right, 0, 9, fill=17), widened(right, 5, 0)):
            close(outputs.scores(scorer, batch), expected, atol=1e-4, rtol=1e-4)


def test_a_real_token_equal_to_the_pad_id_is_scored(scorer, sequences):
    (one,) = sequences(6)
    ends_with_pad = np.r_[one, PAD].astype(np.int32)
    batch = pad([ends_with_pad, *sequences(12)], PAD, side="right")
    assert batch.last.tolist() == [6, 11]
    with torch.no_grad():
        close(outputs.scores(scorer, batch)[0], outputs.token_values(scorer, batch)[0, 6])


def test_a_new_head_is_decided_by_its_seed(actor_path, scorer):
    same = loading.new_scorer(actor_path, torch.float32, PAD, seed=3)
    other = loading.new_scorer(actor_path, torch.float32, PAD, seed=4)
    assert torch.equal(same.score.weight, scorer.score.weight)
    assert not torch.equal(other.score.weight, scorer.score.weight)


def test_weights_that_are_missing_are_named(actor_path, tmp_path):
    weights = load_file(actor_path / "model.safetensors")
    lost = next(name for name in weights if name.endswith("fc1.weight"))
    (tmp_path / "config.json").write_bytes((actor_path / "config.json").read_bytes())
    save_file(
        {k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(DataError, match=r"fc1\.weight"):
        loading.load_actor(tmp_path, torch.float32)


def test_a_language_model_is_no_reward_model(actor_path):
    with pytest.raises(DataError, match=r"score\.weight"):
        loading.load_scorer(actor_path, torch.float32)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_the_sequences(sequences, side):
    several = sequences(3, 7, 1)
    batch = pad(several, PAD, side=side)
    assert [row[mask].tolist() for row, mask in zip(batch.ids, batch.mask, strict=True)] == [
        list(one) for one in several
    ]
    assert (batch.ids[~batch.mask] == PAD).all()
    for positions, mask, one in zip(batch.positions, batch.mask, several, strict=True):
        assert positions[mask].tolist() == list(range(len(one)))
