"""All built-in task families by name."""

from training.data import in_context, local, reasoning, retrieval
from training.data.sample import TaskFamily

FAMILIES: dict[str, TaskFamily] = {
    family.name: family
    for module in (retrieval, local, in_context, reasoning)
    for family in module.FAMILIES
}


def get_families(names: tuple[str, ...]) -> list[TaskFamily]:
    """Look families up.

    Raises: ValueError: an unknown name.
    """
    unknown = sorted(set(names) - FAMILIES.keys())
    if unknown:
        raise ValueError(
            f"expected task families among {sorted(FAMILIES)}, found {unknown}; correct "
            "--data.tasks"
        )
    return [FAMILIES[name] for name in names]
