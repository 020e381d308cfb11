"""RouteTable: the routes of every live request.

Dimension legend: S request slots, L layers, P requests.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from flux_vllm.router.route import Route
from flux_vllm.transfer import to_device


class RouteTable:
    """The routes of every live request, by slot; a request keeps its slot until it ends.

    Free slots hold the default routes, so that taking one needs no work on the device: what ended
    requests leave is cleaned when no slot is free, for all of them together.

    Args:
        num_layers: layers of the model.
        capacity: slots to begin with; the table doubles when they run out (preempted requests
            keep theirs, so more than vLLM's max_num_seqs can be live).
        device: where the routes are used.
    """

    def __init__(self, num_layers: int, capacity: int, device: torch.device) -> None:
        self.num_layers = num_layers
        self.device = device
        self.routes = torch.empty(0, num_layers, dtype=torch.int8, device=device)
        self.full_probability = torch.empty(0, num_layers, device=device)
        self.settled_prompt_len = np.zeros(0, dtype=np.int64)
        """[S] length of the prompt that the routes were settled for; 0 while they are open."""
        self.sparse_from = torch.zeros(0, dtype=torch.int32, device=device)
        """[S] context in tokens beyond which SPARSE layers decode as SPARSE."""
        self.version = 0
        """Grows whenever a slot changes its owner or its routes: what was read under the same
        version still holds."""
        self._default = torch.full(
            (num_layers,), int(Route.UNDECIDED), dtype=torch.int8, device=device
        )
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._used: list[int] = []
        self._grow(capacity)

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, request_id: str) -> int | None:
        """Return a request's slot, or None for a request that has none."""
        return self._slots.get(request_id)

    def fix(self, routes: list[int]) -> None:
        """Give every request, live or to come, these routes: [num_layers] `Route` values."""
        self._default = torch.tensor(routes, dtype=torch.int8, device=self.device)
        self.routes[:] = self._default
        self.version += 1

    def acquire(self, request_id: str) -> tuple[int, bool]:
        """Return a request's slot, and whether it is new: then it has default routes."""
        slot = self._slots.get(request_id)
        if slot is not None:
            return slot, False
        if not self._free:
            self._clean()
        if not self._free:
            self._grow(2 * len(self.settled_prompt_len))
        slot = self._slots[request_id] = self._free.pop()
        self.settled_prompt_len[slot] = 0
        self.version += 1
        return slot, True

    def slots(self, request_ids: Sequence[str]) -> np.ndarray:
        """Return the slots of live requests: [R] int64."""
        return np.fromiter(map(self._slots.__getitem__, request_ids), np.int64, len(request_ids))

    # The table may have grown in one of vLLM's steps, which make tensors in inference mode.
    @torch.inference_mode()
    def write(
        self, slot: int, routes: torch.Tensor, full_probability: torch.Tensor | float
    ) -> None:
        """Give a request its routes [L] int8 and P(FULL) [L] float32."""
        self.routes[slot] = routes
        self.full_probability[slot] = full_probability
        self.version += 1

    # As `write`.
    @torch.inference_mode()
    def settle(self, slot: int, prompt_len: int, full_decode_tokens: int) -> None:
        """Say that a request's routes stand for a prompt of this length.

        Args:
            slot: of the request.
            prompt_len: tokens.
            full_decode_tokens: of the answer, for which SPARSE layers attend to everything.
        """
        self.settled_prompt_len[slot] = prompt_len
        if full_decode_tokens:
            self.sparse_from[slot] = prompt_len + full_decode_tokens
            self.version += 1

    def release(self, request_ids: Iterable[str]) -> None:
        """Take back the slots of requests that ended; unknown requests are passed over."""
        for request_id in request_ids:
            slot = self._slots.pop(request_id, None)
            if slot is not None:
                self._used.append(slot)
                self.version += 1

    def of_slots(self, slots: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the routes and P(FULL) of some slots, views where it is one: [P, L], [P, L]."""
        if len(slots) == 1:  # by far the most frequent, and without launches
            one = slice(int(slots[0]), int(slots[0]) + 1)
            return self.routes[one], self.full_probability[one]
        index = to_device(slots, self.device)
        return self.routes[index], self.full_probability[index]

    # The table may have grown in one of vLLM's steps, which make tensors in inference mode.
    @torch.inference_mode()
    def _clean(self) -> None:
        """Make the slots that were taken back free, with default routes."""
        if not self._used:
            return
        index = to_device(np.array(self._used, dtype=np.int64), self.device)
        self.routes[index] = self._default
        self.full_probability.index_fill_(0, index, float("nan"))
        self._free.extend(self._used)
        self._used = []

    def _grow(self, capacity: int) -> None:
        old = len(self.settled_prompt_len)
        routes = self._default.repeat(capacity, 1)
        probability = torch.full((capacity, self.num_layers), float("nan"), device=self.device)
        routes[:old] = self.routes
        probability[:old] = self.full_probability
        self.routes, self.full_probability = routes, probability
        self.sparse_from = torch.nn.functional.pad(self.sparse_from, (0, capacity - old))
        self.settled_prompt_len = np.pad(self.settled_prompt_len, (0, capacity - old))
        self._free.extend(range(capacity - 1, old - 1, -1))
