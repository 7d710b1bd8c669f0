"""The sampler: responses of a model that is being trained.

It keeps a decode copy of the model's weights, which `refresh` updates before each rollout. Responses are
sampled together, each in a slot. Every few tokens the host checks which have ended, and gives their slots
to the next prompts. On CUDA, and only in a group of one process, a step is one CUDA graph.

Letters: B prompts, P tokens of the longest.
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

LOOK = 16  # tokens between two checks of which responses have ended; the GPU is idle during a check
PLACES = 128  # caches have a multiple of these, so that prompts of similar lengths use the same slots again


class Sampler:
    """Samples responses of a Hugging Face model.

    The processes of `group` share one decode copy, so they call the same methods in the same order, with the
    same prompts and noise. Families without a layout (`families.LAYOUTS`) are sampled by their own forward.
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
        """Copy the model's weights as they are now; all processes of a training call it together.

        Raises:
            UserError: the processes of the group cannot divide the model evenly.
        """
        if not families.has_layout(self.model.config):
            self._plain = plain.sampling_copy(self.model).to(parallel.device())
            return
        self._decoder = self._decoder or Decoder(self.model, self.group)
        self._decoder.refresh(self.model)

    def weights(self) -> list[Weight]:
        """Return the tensors of the decode copy, this process's shards of them; none for plain sampling."""
        return self._decoder.weights if self._decoder else []

    def release(self) -> None:
        """Free the copy of a sharded model, whose memory optimizer steps need. `refresh` makes a new one."""
        if is_sharded(self.model):
            self._decoder = self._slots = self._plain = None

    def generate(self, prompts: Sequence[Ids], noise: Tensor, rows: int) -> list[Generated]:
        """Return one response to each prompt, in their order, sampled `rows` at a time. Call `refresh` first.

        Args:
            noise: (B, max_new_tokens) float64 from `uniforms`, a row per prompt; not used when greedy.

        Returns:
            one `Generated`, or one for every `rows` prompts if the family has no layout.
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
        """Return responses to (B, P) prompts, each sampled in the next slot that is free."""
        total, length, device = len(prompts.ids), self.sampling.max_new_tokens, prompts.ids.device
        slots = self._slots_for(min(rows, total), prompts.ids.shape[1] + length)
        compact, lengths = prompts.compact(), prompts.mask.sum(-1)  # (B, P), (B,)
        tokens = torch.full((total, length), self.sampling.pad_id, device=device)  # (B, max_new_tokens)
        logprobs, counts = torch.zeros(tokens.shape, device=device), torch.zeros_like(lengths)
        waiting, held = deque(range(total)), dict[int, int]()  # slot -> prompt
        while waiting or held:
            idle = [slot for slot, runs in enumerate(slots.running.tolist()) if not runs]
            if ended := [slot for slot in idle if slot in held]:
                of = torch.tensor([held.pop(slot) for slot in ended], device=device)
                at = torch.tensor(ended, device=device)
                tokens[of], logprobs[of], counts[of] = slots.tokens[at], slots.logprobs[at], slots.count[at]
            # Admitting one prompt costs as much as admitting many: wait until a quarter of the slots is idle.
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
        """Return `rows` slots of at least `places` each: the last ones again if they fit, else new ones."""
        assert self._decoder is not None, "refresh comes first"
        if self._slots and self._slots.rows == rows and self._slots.places >= places:
            self._slots.running.zero_()
            return self._slots
        self._slots = None  # its memory is free before more is needed
        self._slots = Slots(self._decoder, rows, -(-places // PLACES) * PLACES, self.sampling)
        return self._slots


def generate(model: Any, prompts: Sequence[Ids], sampling: Sampling, noise: Tensor) -> Generated:
    """Return one response of a Hugging Face model to each prompt, by a sampler that is used once.

    Args:
        noise: (B, max_new_tokens) float64 from `uniforms`.
    """
    sampler = Sampler(model, sampling)
    sampler.refresh()
    (generated,) = sampler.generate(prompts, noise, rows=len(prompts))
    return generated
