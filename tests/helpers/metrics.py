"""Read flux's metrics as a scraper does."""

from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> Samples:
    """Parse an exposition to {(sample name, sorted labels): value}, flux's samples only."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("flux_")
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    """Sum the samples of a name whose labels include the given ones."""
    wanted: Iterable[tuple[str, str]] = labels.items()
    found = [v for (n, ls), v in samples.items() if n == name and set(wanted) <= set(ls)]
    if not found:
        raise KeyError(f"no sample {name} with {labels}")
    return sum(found)
