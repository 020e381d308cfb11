"""What flux says of itself on vLLM's `/metrics`."""

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

PHASES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Counters:
    """A reading of the counters, or the difference of two."""

    decisions: dict[tuple[int, str], int]
    """By layer and route (`full` or `sparse`)."""
    attended: dict[str, int]
    """Keys attended to, by phase."""
    context: dict[str, int]
    """Keys full attention would have attended to, by phase."""
    unrouted_rows: int

    @classmethod
    def parse(cls, text: str) -> "Counters":
        """Read the text of `/metrics`."""
        samples = [
            sample
            for family in text_string_to_metric_families(text)
            if family.name.startswith("flux_")
            for sample in family.samples
        ]

        def total(name: str) -> list[tuple[dict[str, str], int]]:
            return [(s.labels, int(s.value)) for s in samples if s.name == f"{name}_total"]

        return cls(
            decisions={
                (int(labels["layer"]), labels["route"]): value
                for labels, value in total("flux_route_decisions")
            },
            attended={labels["phase"]: value for labels, value in total("flux_attended_tokens")},
            context={labels["phase"]: value for labels, value in total("flux_context_tokens")},
            unrouted_rows=sum(value for _, value in total("flux_unrouted_rows")),
        )

    def since(self, earlier: "Counters") -> "Counters":
        """Subtract an earlier reading."""
        return Counters(
            decisions={
                key: value - earlier.decisions.get(key, 0) for key, value in self.decisions.items()
            },
            attended={p: value - earlier.attended.get(p, 0) for p, value in self.attended.items()},
            context={p: value - earlier.context.get(p, 0) for p, value in self.context.items()},
            unrouted_rows=self.unrouted_rows - earlier.unrouted_rows,
        )

    def routes(self, num_layers: int) -> list[int]:
        """Give each layer's route, if one request was routed: 1 FULL, 0 SPARSE, -1 not routed."""
        return [
            1
            if self.decisions.get((layer, "full"), 0)
            else 0
            if self.decisions.get((layer, "sparse"), 0)
            else -1
            for layer in range(num_layers)
        ]

    def saving(self, phase: str) -> float:
        """Return the share of full attention's keys that were not read, 0 to 1."""
        context = self.context.get(phase, 0)
        return 1 - self.attended.get(phase, 0) / context if context else 0.0
