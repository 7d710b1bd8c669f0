"""Models as DeepSpeed gets them: one `forward`, and below ZeRO-2 a few flat parameters instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

LARGEST = 2**28  # numbers of a flat parameter: 1 GiB in 32 bits


class SingleForward(nn.Module):
    """A model whose computations all go through one `forward`, where DeepSpeed has its hooks.

    `forward(compute, *arguments)` returns `compute(model, *arguments)`; so does an engine around it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Return `compute(model, *arguments)`, whatever its type."""
        return compute(self.model, *arguments)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state, for DeepSpeed's checkpoints, without further names of tied frozen weights.

        DeepSpeed leaves out frozen weights only by their first name.
        """
        state, first = super().state_dict(*args, **kwargs), {n for n, _ in self.named_parameters()}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name not in first and not parameter.requires_grad:
                state.pop(name, None)
        return state


class FlatForward(nn.Module):
    """A model whose trained parameters are parts of a few flat ones: all that DeepSpeed and optimizers see.

    DeepSpeed loops over parameters in Python, several times a step, and a GPU waits for it. There is one flat
    parameter for each group of the optimizer, or a few of at most `LARGEST`, because DeepSpeed converts each
    gradient as a whole. The model's own parameters share their memory. They get no gradients: where gradients
    are on, parts of the flat parameters take their places during a forward.
    """

    def __init__(self, model: nn.Module, groups: list[dict[str, Any]]) -> None:
        """Flatten `groups`, the optimizer's, in place."""
        super().__init__()
        self._hidden = [model]  # in a list, so that its parameters are not this module's
        self._parts: list[list[Tensor]] = []
        self.flat = nn.ParameterList()
        for group in groups:
            parts = _in_parts(group["params"])
            group["params"] = [
                nn.Parameter(torch.cat([p.detach().flatten() for p in part])) for part in parts
            ]
            self._parts += parts
            self.flat.extend(group["params"])
        places: dict[Tensor, list[tuple[dict[str, Any], str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(parameter, []).append((module._parameters, name))
        self._places = [places[p] for part in self._parts for p in part]
        self.share_memory_of_parts()

    @property
    def model(self) -> Any:
        """The model itself."""
        return self._hidden[0]

    def share_memory_of_parts(self) -> None:
        """Let the model's parameters point into the flat ones, which DeepSpeed may have moved."""
        for part, flat in zip(self._parts, self.flat, strict=True):
            values = flat.detach().split([p.numel() for p in part])
            for parameter, value in zip(part, values, strict=True):
                parameter.data = value.view(parameter.shape)
        pairs = zip(self.flat, self._parts, strict=True)
        views = [_Parts.apply(flat, part) for flat, part in pairs]  # type: ignore[no-untyped-call]
        self._views: list[Tensor] = [view for part in views for view in part]

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """Return `compute(model, *arguments)`, whatever its type."""
        if not torch.is_grad_enabled():
            return compute(self.model, *arguments)
        with self._parts_in_place():
            return compute(self.model, *arguments)

    @contextmanager
    def _parts_in_place(self) -> Iterator[None]:
        own = [p for part in self._parts for p in part]
        self._put(self._views)
        try:
            yield
        finally:
            self._put(own)

    def _put(self, values: list[Tensor]) -> None:
        for places, value in zip(self._places, values, strict=True):
            for parameters, name in places:
                parameters[name] = value

    def train(self, mode: bool = True) -> FlatForward:
        """Set the model's mode too."""
        self.model.train(mode)
        return super().train(mode)


def _in_parts(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Return parameters in parts of at most `LARGEST` numbers; one that is larger is a part itself."""
    parts, size = [parameters[:1]], parameters[0].numel()
    for parameter in parameters[1:]:
        if size + parameter.numel() > LARGEST:
            parts.append([])
            size = 0
        parts[-1].append(parameter)
        size += parameter.numel()
    return parts


class _Parts(torch.autograd.Function):
    """The parts of a flat parameter. Its gradient is theirs, one after another; parts without one have zeros."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, parts: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.parts = parts
        ctx.set_materialize_grads(False)
        return tuple(part.detach() for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        found = zip(ctx.parts, gradients, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in found]), None


def unwrap(wrapped: Any) -> Any:
    """Return the Hugging Face model inside one of these modules or an engine."""
    return wrapped.module.model if isinstance(wrapped, deepspeed.DeepSpeedEngine) else wrapped.model
