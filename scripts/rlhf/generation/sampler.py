"""The sampler: responses of a model that is being trained.

It keeps a decode copy of the model's weights, which is refreshed before each rollout, and on a GPU the
CUDA graph of a step. The host looks at the responses every few tokens; a slot whose response has ended
goes to the next prompt.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf import parallel
from rlhf.config.batch import slices
from rlhf.data.rows import Ids
from rlhf.data.tokens import Padded, pad
from rlhf.generation import plain
from rlhf.generation.decoder import Decoder, Weight
from rlhf.generation.sampling import Generated, Sampling, assemble
from rlhf.generation.slots import Slots
from rlhf.models import families
from rlhf.models.sharding import is_sharded
from rlhf.parallel import Group

logger = logging.getLogger(__name__)

LOOK = 16  # tokens between two looks at which responses have ended; the GPU is idle during a look
PLACES = 128  # a cache has a multiple of these: prompts of other lengths fit the same graph


class Sampler:
    """Samples responses of a bare model; the processes of `group` compute together, all in one order.

    Families without a layout (`families.LAYOUTS`) are sampled by their own forward, a token at a time.
    """

    def __init__(self, model: Any, sampling: Sampling, group: Group | None = None) -> None:
        self.model, self.sampling, self.group = model, sampling, group or parallel.group(1)
        self._decoder: Decoder | None = None
        self._slots: Slots | None = None
        self._plain: Any = None
        if not families.has_layout(model.config):
            logger.info(
                "%s models are sampled by their own forward, not by the engine", model.config.model_type
            )

    def refresh(self) -> None:
        """Take the model's weights as they are now; all processes of a training call it together."""
        if not families.has_layout(self.model.config):
            self._plain = plain.sampling_copy(self.model).to(parallel.device())
            return
        self._decoder = self._decoder or Decoder(self.model, self.group)
        self._decoder.refresh(self.model)

    def weights(self) -> list[Weight]:
        """Return the tensors of the decode copy, this process's shards of them; none for plain sampling."""
        return self._decoder.weights if self._decoder else []

    def release(self) -> None:
        """Free the copy of a sharded model, for which there is no room beside a training."""
        if is_sharded(self.model):
            self._decoder = self._slots = self._plain = None

    def generate(self, prompts: Sequence[Ids], noise: Tensor, rows: int) -> list[Generated]:
        """Sample one response to each prompt, `rows` at a time, after a `refresh`.

        Args:
            noise: (B, max_new_tokens) float64 from `uniforms`, a row per prompt; not used when greedy.
        """
        pad_id, device = self.sampling.pad_id, parallel.device()
        if self._plain is None:
            batch = pad(prompts, pad_id, side="left").to(device)  # (B, P)
            return [self._decode(batch, noise.to(device), rows)]
        generated = []
        for part in slices(len(prompts), rows):
            batch = pad(prompts[part], pad_id, side="left").to(device)
            generated.append(plain.generate(self._plain, batch, self.sampling, noise[part]))
        return generated

    def _decode(self, prompts: Padded, noise: Tensor, rows: int) -> Generated:
        """Sample responses to (B, P) prompts in slots that are used again."""
        total, length, device = len(prompts.ids), self.sampling.max_new_tokens, prompts.ids.device
        slots = self._slots_for(min(rows, total), prompts.ids.shape[1] + length)
        compact, lengths = prompts.compact(), prompts.mask.sum(-1)  # (B, P), (B,)
        tokens = torch.full((total, length), self.sampling.pad_id, device=device)  # (B, A)
        logprobs, counts = torch.zeros(tokens.shape, device=device), torch.zeros_like(lengths)
        waiting, held = deque(range(total)), dict[int, int]()  # slot -> prompt
        while waiting or held:
            idle = [slot for slot, runs in enumerate(slots.running.tolist()) if not runs]
            if ended := [slot for slot in idle if slot in held]:
                of = torch.tensor([held.pop(slot) for slot in ended], device=device)
                at = torch.tensor(ended, device=device)
                tokens[of], logprobs[of], counts[of] = slots.tokens[at], slots.logprobs[at], slots.count[at]
            # A pass over new prompts costs as much for one as for many: wait until a quarter is idle.
            if waiting and (4 * len(idle) >= slots.rows or not held):
                new = {slot: waiting.popleft() for slot in idle[: len(waiting)]}
                held |= new
                at, of = (torch.tensor(list(x), device=device) for x in (new.keys(), new.values()))
                width = int(lengths[of].max())
                slots.admit(at, compact.ids[of, :width], lengths[of], noise[of])
            if held:
                slots.step(1 if device.type == "cpu" else LOOK)
        return assemble(prompts, tokens, counts, logprobs, self.sampling.eos_id)

    def _slots_for(self, rows: int, places: int) -> Slots:
        """Return slots of that many rows; the last ones are used again if they have enough places."""
        assert self._decoder is not None, "refresh comes first"
        if self._slots and self._slots.rows == rows and self._slots.places >= places:
            self._slots.running.zero_()
            return self._slots
        self._slots = None  # its memory is free before more is needed
        self._slots = Slots(self._decoder, rows, -(-places // PLACES) * PLACES, self.sampling)
        return self._slots


def generate(model: Any, prompts: Sequence[Ids], sampling: Sampling, noise: Tensor) -> Generated:
    """Sample one response of a bare model to each prompt, once, with noise (B, max_new_tokens)."""
    sampler = Sampler(model, sampling)
    sampler.refresh()
    (generated,) = sampler.generate(prompts, noise, rows=len(prompts))
    return generated
