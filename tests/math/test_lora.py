from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.config import training
from rlhf.data.streams import Purpose, Stream
from rlhf.data.tokens import pad
from rlhf.errors import DataError
from rlhf.generation.sampler import generate
from rlhf.generation.sampling import Sampling, uniforms
from rlhf.models import loading, lora, outputs, saving
from rlhf.training import engine, rollout
from rlhf.training.wrapped import SingleForward

PAD = 1
close = torch.testing.assert_close


class NoTokenizer:
    bos_token_id, eos_token_id, pad_token_id = 0, 2, PAD

    def save_pretrained(self, path):
        """Write nothing."""


def settings(**values):
    return training.Lora(**{"dim": 4, "alpha": 8.0, "learning_rate": 1e-3} | values)


def adapted(model, perturbed=True, **values):
    """Return a copy with adapters; with B = 0 they would do nothing, so B gets random values."""
    model = copy.deepcopy(model)
    lora.add(model, settings(**values), seed=1)
    if perturbed:
        noise = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for layer in lora.layers(model).values():
                layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=noise))
    return model


def logits(model, sequences):
    batch = pad(sequences(9, 14, 6), PAD, side="left")
    with torch.no_grad():
        labels = torch.arange(14) >= 9  # the last five tokens of every row
        return outputs.response_logits(model, batch, labels.expand_as(batch.mask))


@pytest.fixture
def scorer(actor_path):
    return loading.new_scorer(actor_path, torch.float32, PAD, seed=3).eval()


def test_new_adapters_change_nothing(actor, sequences):
    close(logits(adapted(actor, perturbed=False), sequences), logits(actor, sequences), atol=0, rtol=0)


def test_with_adapters_disabled_the_model_is_the_one_without_adapters(actor, sequences):
    model = adapted(actor)
    assert not torch.allclose(logits(model, sequences), logits(actor, sequences), atol=0.1)
    with lora.adapters_disabled(model):
        close(logits(model, sequences), logits(actor, sequences), atol=0, rtol=0)
    assert not torch.allclose(logits(model, sequences), logits(actor, sequences), atol=0.1)


def test_the_actor_with_adapters_disabled_equals_a_separate_reference(actor, scorer, sequences):
    model, sampling = adapted(actor), Sampling(6, 0.7, eos_id=2, pad_id=PAD)
    noise = uniforms(Stream(1, Purpose.ROLLOUT), range(3), 6)
    generated = generate(model, sequences(3, 9, 5), sampling, noise)
    copied, same = (
        rollout.observe(
            rollout.Models(SingleForward(model), SingleForward(scorer), reference, SingleForward(scorer)),
            generated,
            0.7,
            2,
        )
        for reference in (SingleForward(actor), None)
    )
    assert torch.equal(same.ref_logprobs, copied.ref_logprobs)
    assert torch.equal(same.old_logprobs, copied.old_logprobs)
    assert (same.old_logprobs - same.ref_logprobs)[same.response_mask].abs().mean() > 0.1


def test_the_addition_is_scaled_by_alpha_over_dim(actor):
    layer = next(iter(lora.layers(adapted(actor, dim=2, alpha=6.0)).values()))
    x = torch.randn(5, layer.in_features)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    close(layer(x), plain + 3.0 * (x @ layer.lora_A.T) @ layer.lora_B.T)


def test_published_weights_give_the_logits_of_weights_and_adapters(actor, sequences, tmp_path):
    model = adapted(actor)
    saving.save(model, NoTokenizer(), tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert again.state_dict().keys() == actor.state_dict().keys()
    close(logits(again, sequences), logits(model, sequences), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("role", ["actor", "scorer"])
def test_peft_reads_the_adapter(actor, scorer, actor_path, sequences, tmp_path, role):
    peft = pytest.importorskip("peft", reason="peft is not installed: its format is not checked")
    plain, auto = {
        "actor": (actor, AutoModelForCausalLM),
        "scorer": (scorer, AutoModelForSequenceClassification),
    }[role]
    model = adapted(plain)
    saving.save_adapter(model, settings(), str(actor_path), tmp_path / "adapter")
    base = auto.from_pretrained(
        actor_path, **({} if role == "actor" else {"num_labels": 1, "pad_token_id": PAD})
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = pad(sequences(9, 14, 6), PAD, side="right")
    with torch.no_grad():
        expected = model(**outputs.hidden_inputs(model, batch)).logits
        found = theirs(**outputs.hidden_inputs(theirs, batch)).logits
    close(found, expected, atol=1e-4, rtol=1e-4)


def test_only_adapters_are_trained_and_a_scorers_head(actor, scorer):
    trained = {n for n, p in adapted(actor).named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in adapted(actor).named_parameters() if lora.is_adapter(n)}
    trained = {n for n, p in adapted(scorer).named_parameters() if p.requires_grad}
    assert {n for n in trained if not lora.is_adapter(n)} == {"score.weight"}


def test_with_only_false_everything_but_the_adapted_weights_is_trained(actor):
    model = adapted(actor, only=False)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}.weight" for name in lora.layers(model)}


def test_adapters_have_their_own_learning_rate(scorer):
    optimizer = training.Optimizer(
        learning_rate=0.5,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        max_grad_norm=1.0,
        schedule="constant",
        warmup_steps=0,
        final_ratio=1.0,
    )
    model = adapted(scorer)
    adapters, head = engine._parameter_groups(model, optimizer, settings(learning_rate=0.25))
    assert adapters["lr"] == 0.25
    assert len(adapters["params"]) == 2 * len(lora.layers(model))
    assert "lr" not in head
    assert [p is model.score.weight for p in head["params"]] == [True]


def test_default_targets_are_all_linear_layers_of_a_decoder_layer(actor):
    found = {name.rpartition(".")[2] for name in lora.layers(adapted(actor))}
    assert found == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert len(lora.layers(adapted(actor))) == 12


def test_named_targets_match_whole_words_at_the_end_of_a_path(actor):
    assert {n.rpartition(".")[2] for n in lora.layers(adapted(actor, targets=("v_proj",)))} == {"v_proj"}
    assert list(lora.layers(adapted(actor, targets=("layers.1.fc1",)))) == ["model.decoder.layers.1.fc1"]


def test_a_target_that_matches_no_layer_is_an_error_with_the_possible_names(actor):
    with pytest.raises(DataError, match=r"roj, w_proj matches no linear layer .* k_proj, lm_head, out_proj"):
        adapted(actor, targets=("roj", "v_proj", "w_proj"))


def test_an_unknown_family_must_name_its_targets(actor):
    model = copy.deepcopy(actor)
    model.config.model_type = "gpt2"
    with pytest.raises(DataError, match=r"gpt2 .*not known.*lora\.targets"):
        lora.add(model, settings(), seed=1)


def test_the_seed_decides_where_adapters_start(actor):
    one, two, other = (copy.deepcopy(actor) for _ in range(3))
    for model, seed in ((one, 1), (two, 1), (other, 2)):
        lora.add(model, settings(), seed)
    first, second, third = (next(iter(lora.layers(m).values())).lora_A for m in (one, two, other))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_saved_adapter_holds_adapters_only_and_names_its_base_model(actor, actor_path, tmp_path):
    saving.save_adapter(adapted(actor), settings(), str(actor_path), tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(".lora_A.weight" in name or ".lora_B.weight" in name for name in tensors)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(actor_path), 4, 8.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_gradients_of_an_adapted_layer_are_those_of_its_formula(bias, shape):
    torch.manual_seed(0)
    layer = lora.LoraLinear(torch.nn.Linear(6, 4, bias=bias).double(), 3, 6.0, torch.Generator())
    torch.nn.init.normal_(layer.lora_B)
    x, weights = torch.randn(*shape, 6, dtype=torch.double, requires_grad=True), torch.randn(4).double()
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    formula = plain + 2.0 * x @ layer.lora_A.T @ layer.lora_B.T
    close(layer(x), formula)
    trained = [x, layer.lora_A, layer.lora_B, *([layer.bias] if bias else [])]
    ours, theirs = (torch.autograd.grad((y * weights).sum(), trained) for y in (layer(x), formula))
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)
