"""How much reading of keys and values was saved, from the counters that `/metrics` shows."""

import json
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

PHASES = ("prefill", "decode")


@dataclass(slots=True)
class KeyReading:
    """Keys of one phase, summed over queries, routed layers and workers."""

    attended_tokens: float = 0.0
    context_tokens: float = 0.0
    """What full attention would have attended to."""

    @property
    def saved(self) -> float | None:
        """Share saved, 0 to 1; None before anything was read."""
        if not self.context_tokens:
            return None
        return 1 - self.attended_tokens / self.context_tokens


def read_key_reading(directory: Path) -> dict[str, KeyReading]:
    """Sum the workers' counters.

    Args:
        directory: shared with the workers.

    Returns: dict of KeyReading by phase.
    """
    reading = {phase: KeyReading() for phase in PHASES}
    for path in directory.glob("counter_flux-*.db"):
        for key, value, _, _ in MmapedDict.read_all_values_from_file(str(path)):
            # Looked for in the text: parsing every key would cost more than all the rest.
            for sample, field in (
                ('"flux_attended_tokens_total"', "attended_tokens"),
                ('"flux_context_tokens_total"', "context_tokens"),
            ):
                if sample in key:
                    phase = reading[json.loads(key)[2]["phase"]]
                    setattr(phase, field, getattr(phase, field) + value)
    return reading
