"""Every family gives the same results alone, padded and packed; it generates, is saved, adapted and trained.

Tolerance: 1e-4 in fp32, where a batch is computed in another order; bits where nothing is.
"""

from __future__ import annotations

import json
import math
import os

import families
import numpy as np
import pytest
import torch
import trainings
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from rlhf.config.training import Lora
from rlhf.data.streams import Purpose, Stream
from rlhf.data.tokens import Packed, arrange, pack, pad, response_labels
from rlhf.errors import DataError, UserError
from rlhf.generation.sampler import generate
from rlhf.generation.sampling import Sampling, uniforms
from rlhf.models import loading, lora, outputs, saving
from rlhf.training import reward, sft

PAD, EOS = 1, 2
close = torch.testing.assert_close


NAMES = list(families.FAMILIES)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    for name in NAMES:
        families.tiny(name).save_pretrained(root / name)
    return {name: root / name for name in NAMES}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def model(paths, name):
    return loading.load_actor(paths[name], torch.float32).eval()


@pytest.fixture
def scorer(paths, name):
    return loading.new_scorer(paths[name], torch.float32, PAD, seed=3).eval()


def logprobs(model, batch, prompts):
    with torch.no_grad():
        return outputs.response_logprobs(model, batch, response_labels(prompts, batch))


def test_dropout_is_off(model):
    batch = pad([np.arange(3, 20, dtype=np.int32)], PAD, side="right")
    model.train()
    with torch.no_grad():
        one, two = (model(**outputs.hidden_inputs(model, batch)).logits for _ in range(2))
    assert torch.equal(one, two)


def test_logprobs_of_a_sample_are_equal_alone_padded_and_packed(model, sequences):
    several, prompts = sequences(9, 14, 6, 11, 7), [3, 5, 1, 2, 4]
    alone = torch.cat(
        [logprobs(model, pad([s], PAD, side="right"), [p]) for s, p in zip(several, prompts, strict=True)]
    )
    close(logprobs(model, pad(several, PAD, side="right"), prompts), alone, atol=1e-4, rtol=1e-4)
    packed = pack([[s] for s in several], PAD, 25)
    order = torch.cat(
        [torch.full((len(s) - p,), i) for i, (s, p) in enumerate(zip(several, prompts, strict=True))]
    )
    found = logprobs(model, packed, prompts)
    labels = response_labels(prompts, packed)
    assert torch.equal(packed.sequences[labels].sort().values, order)
    found = found[packed.sequences[labels].argsort(stable=True)]
    close(found, alone, atol=1e-4, rtol=1e-4)


def test_scores_of_a_sample_are_equal_alone_padded_and_packed(scorer, sequences):
    several = sequences(9, 14, 6, 11)
    pairs = [several[:2], several[2:]]
    with torch.no_grad():
        alone = torch.cat([outputs.scores(scorer, pad([s], PAD, side="right")) for s in several])
        for batch in (arrange(pairs, PAD, None), arrange(pairs, PAD, 25), pad(several, PAD, side="left")):
            close(outputs.scores(scorer, batch), alone, atol=1e-4, rtol=1e-4)


def test_restarted_positions_alone_do_not_separate_packed_sequences(model, sequences):
    """Without the mask a sequence attends to the one before it: the mask is what separates them."""
    several = sequences(9, 14)
    packed = pack([several], PAD, 23)
    ones = torch.ones_like(packed.attention).tril()
    with torch.no_grad():
        leaking = model(input_ids=packed.ids, attention_mask=ones, position_ids=packed.positions).logits
        exact = model(**outputs.hidden_inputs(model, packed)).logits
        alone = model(**outputs.hidden_inputs(model, pad([several[1]], PAD, side="right"))).logits
    close(exact[0, 9:], alone[0], atol=1e-4, rtol=1e-4)
    assert (leaking[0, 9:] - alone[0]).abs().max() > 0.01


def test_greedy_responses_equal_those_of_transformers(model, sequences):
    prompts = sequences(3, 9, 5, 14)
    batch = pad(prompts, PAD, side="left")
    noise = uniforms(Stream(0, Purpose.PASS), range(4), 10)
    generated = generate(model, prompts, Sampling(10, 0, EOS, PAD), noise)
    theirs = model.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask.long(),
        do_sample=False,
        max_new_tokens=10,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    assert torch.equal(generated.batch.ids, theirs)


def test_saved_models_are_read_by_transformers(model, scorer, sequences, tmp_path):
    tokenizer = trainings.NoTokenizer()
    saving.save(model, tokenizer, tmp_path / "actor", temperature=0.7)
    saving.save(scorer, tokenizer, tmp_path / "scorer")
    batch = pad(sequences(9, 14), PAD, side="right")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "actor").eval()
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer").eval()
    how = again.generation_config  # sampled by default as responses were in training
    assert (how.do_sample, how.temperature, how.top_k, how.top_p or 1.0) == (True, 0.7, 0, 1.0)
    with torch.no_grad():
        inputs = outputs.hidden_inputs(model, batch)
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        close(
            judge(input_ids=batch.ids, attention_mask=batch.mask.long()).logits[:, 0],
            outputs.scores(scorer, batch),
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"model_type": "nosuch"}', '{"model_type": "opt", "hidden_size": "wide"}']
)
def test_a_config_json_that_is_not_a_models_is_an_error_with_its_path(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=r"/config\.json is not that of a model: "):
        loading.load_actor(tmp_path, torch.float32)


@pytest.mark.parametrize("damage", [os.unlink, lambda path: os.truncate(path, 100)])
def test_weights_that_cannot_be_read_are_an_error_with_their_path(actor, tmp_path, damage):
    actor.save_pretrained(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=f"the weights in {tmp_path} cannot be read: ") as caught:
        loading.load_actor(tmp_path, torch.float32)
    assert "\n" not in str(caught.value)


def test_logits_equal_those_of_transformers_forward(model, sequences):
    batch = pad(sequences(9, 14, 6), PAD, side="right")
    labels = response_labels([3, 5, 1], batch)
    with torch.no_grad():
        whole = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        close(
            outputs.response_logits(model, batch, labels), whole[:, :-1][labels[:, 1:]], atol=1e-4, rtol=1e-4
        )


def test_logits_that_a_family_caps_are_capped(sequences, tmp_path):
    torch.manual_seed(5)
    capped = Gemma2ForCausalLM(
        Gemma2Config(**families.COMMON, **families.GROUPED, head_dim=8, final_logit_softcapping=0.5)
    ).eval()
    test_logits_equal_those_of_transformers_forward(capped, sequences)
    capped.config.final_logit_softcapping = None
    batch = pad(sequences(9), PAD, side="right")
    with torch.no_grad():
        assert outputs.response_logits(capped, batch, batch.mask & (batch.positions > 3)).abs().max() > 0.6


def test_a_family_that_scales_its_logits_is_refused(actor, tmp_path):
    actor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"logit_scale": 0.0625}))
    with pytest.raises(UserError, match=r"opt models scale their logits \(logit_scale = 0\.0625\)"):
        loading.load_actor(tmp_path, torch.float32)


def test_sequences_longer_than_a_models_positions_are_refused(actor_path):
    loading.refuse_too_long(actor_path, 64, "sft.max_tokens")
    with pytest.raises(
        UserError, match=r"sft\.max_tokens: sequences of up to 65 tokens, but .* has 64 positions"
    ):
        loading.refuse_too_long(actor_path, 65, "sft.max_tokens")


def test_a_new_head_has_the_width_of_the_models_output(scorer, name):
    width = 16 if name == "opt-350m" else 32
    assert tuple(scorer.score.weight.shape) == (1, width)
    assert float(scorer.score.weight.detach().std()) == pytest.approx(1 / math.sqrt(width + 1), rel=0.5)


def test_every_linear_layer_of_a_decoder_layer_gets_an_adapter(model):
    inside = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    lora.add(model, Lora(dim=2, alpha=2.0, learning_rate=1e-3), seed=1)
    assert sorted(lora.layers(model)) == sorted(inside)
    assert len(inside) >= 8


def test_gradients_of_packed_and_padded_rows_are_equal(model, scorer, sequences):
    columns = [sequences(*np.random.default_rng(s).integers(2, 12, 6), seed=s) for s in range(3)]
    pairs = [list(row) for row in zip(*columns, strict=True)]
    rows = [row[:2] for row in pairs]
    for learner, batch, task, width in ((model, rows, sft.task, 24), (scorer, pairs, reward.task, 48)):
        found = []
        for pack_width in (None, width):
            learner.zero_grad()
            trainings.loss(task(PAD, pack_width), learner, batch).backward()
            found.append({n: p.grad.clone() for n, p in learner.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for n, gradient in found[0].items():
            close(found[1][n], gradient, atol=2e-4, rtol=1e-3, msg=lambda m, n=n: f"{n}: {m}")


@pytest.fixture(scope="module")
def trained(paths, tmp_path_factory):
    """Return stage-family -> directory: all stages of all families, on two processes with ZeRO-3."""
    data, cases = tmp_path_factory.mktemp("data"), []
    for stage in ("sft", "reward", "rlhf"):
        trainings.write_rows(data / stage, stage, vocabulary=64)
    for name in NAMES:
        judge = paths[name].with_name(f"{name}-scorer")
        loading.new_scorer(paths[name], torch.float32, PAD, seed=3).save_pretrained(judge)
        for stage in ("sft", "reward", "rlhf"):
            changes = {"run": {"zero_stage": 3}} | ({"iterations": 1} if stage == "rlhf" else {"steps": 4})
            own = {"actor": str(paths[name]), "scorer": str(judge)}
            cases.append({"name": f"{stage}-{name}", "stage": stage, "sources": own, "changes": changes})
    sources = {"actor": paths["opt"], "scorer": paths["opt"], "data": data}
    return trainings.launch(tmp_path_factory.mktemp("trained"), 2, sources, cases)


@pytest.mark.parametrize("stage", ["sft", "reward", "rlhf"])
def test_every_family_goes_through_every_stage(trained, paths, name, stage):
    path = trained / f"{stage}-{name}"
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    auto = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    model, info = auto.from_pretrained(path / "model", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if stage != "reward":
        before = AutoModelForCausalLM.from_pretrained(paths[name]).state_dict()
        assert any(not torch.equal(before[n], w) for n, w in model.state_dict().items())
    else:
        assert {line["loss"] for line in lines} != {lines[0]["loss"]}


def test_packed_rows_hold_every_sequence_once(sequences):
    several = sequences(9, 14, 6, 11, 7, 2, 20)
    packed = pack([[s] for s in several], PAD, 25)
    assert isinstance(packed, Packed)
    assert packed.ids.shape[1] <= 25
    for i, one in enumerate(several):
        here = packed.sequences == i
        assert packed.ids[here].tolist() == one.tolist()
        assert packed.positions[here].tolist() == list(range(len(one)))
        assert packed.ids.flatten()[packed.ends[i]] == one[-1]
    assert int((packed.sequences >= 0).sum()) == sum(map(len, several))
    assert (packed.ids[packed.sequences < 0] == PAD).all()
    groups = pack([several[:3], several[3:5], several[5:]], PAD, 30)
    row_of = [int((groups.sequences == i).any(-1).long().argmax()) for i in range(7)]
    assert row_of[0] == row_of[1] == row_of[2]
    assert row_of[3] == row_of[4]
    assert row_of[5] == row_of[6]
