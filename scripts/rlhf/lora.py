"""LoRA: low-rank adapters beside frozen weights, merged into them when a model is published.

An adapted layer keeps the names of its weight and bias, so that what is published has the names of
the model without adapters. Source: Hu et al. 2021, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf import families
from rlhf.config import Lora
from rlhf.errors import DataError

HEAD = "score"  # a scorer's head is new: it is trained in any case


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank addition: W x + b + alpha / dim * B (A x)."""

    def __init__(self, base: nn.Linear, dim: int, alpha: float, noise: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        where = {"dtype": base.weight.dtype, "device": base.weight.device}
        bound = 1 / math.sqrt(base.in_features)
        start = torch.empty(dim, base.in_features).uniform_(-bound, bound, generator=noise)
        self.lora_A = nn.Parameter(start.to(**where))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, dim, **where))
        self.scale, self.active = alpha / dim, True

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        return out + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B) if self.active else out

    def merged(self) -> Tensor:
        """Return the weight that does the same without an adapter; computed in 32 bits."""
        addition = self.scale * self.lora_B.float() @ self.lora_A.float()
        return (self.weight.float() + addition).to(self.weight.dtype)


def add(model: Any, config: Lora, seed: int) -> None:
    """Put adapters beside the target layers of `model`, and freeze what is not trained.

    Raises:
        DataError: a target's name matches no linear layer.
    """
    targets = config.targets or families.linear_layers(model.config)
    chosen = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and _matches(n, targets)}
    if lost := [t for t in targets if not any(_matches(name, (t,)) for name in chosen)]:
        layers = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise DataError(
            f"lora.targets: {', '.join(lost)} matches no linear layer of this {model.config.model_type}"
            f" model; there are: {', '.join(layers)}"
        )
    if config.only:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[0] == HEAD)
    noise = torch.Generator().manual_seed(seed)
    for name, layer in chosen.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], LoraLinear(layer, config.dim, config.alpha, noise))


def _matches(name: str, targets: tuple[str, ...]) -> bool:
    """Return whether a module's path is a target or ends with one, in whole words."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return path -> adapted layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return name.rpartition(".")[2] in ("lora_A", "lora_B")


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """Let the model be what it was before adapters were added, within this."""
    adapted = layers(model).values()
    for layer in adapted:
        layer.active = False
    try:
        yield
    finally:
        for layer in adapted:
            layer.active = True


def parts(model: nn.Module, name: str) -> list[Tensor]:
    """Return the parameters that the published weight `name` is made of."""
    owner = model.get_submodule(name.rpartition(".")[0])
    weight = model.get_parameter(name)
    return [weight, owner.lora_A, owner.lora_B] if _is_adapted(owner, name) else [weight]


def published(model: nn.Module, name: str) -> Tensor:
    """Return the weight `name` with its adapter merged; its parts must be whole."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return owner.merged() if _is_adapted(owner, name) else model.get_parameter(name)


def _is_adapted(owner: nn.Module, name: str) -> bool:
    return isinstance(owner, LoraLinear) and name.endswith("weight")


def peft_config(model: Any, config: Lora, base: str) -> dict[str, Any]:
    """Return what PEFT writes as `adapter_config.json`.

    Args:
        base: where the model without adapters lies.
    """
    generates = model.can_generate()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if generates else "SEQ_CLS",
        "base_model_name_or_path": base,
        "r": config.dim,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(config.targets or families.linear_layers(model.config)),
        "modules_to_save": None if generates else [HEAD],
        "inference_mode": True,
    }
