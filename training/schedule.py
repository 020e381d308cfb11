"""The learning rate over a run."""

import math

from training.config import OptimizerSettings


def rate_scale(progress: float, settings: OptimizerSettings) -> float:
    """Give the share of the peak rate: a linear rise, then a cosine to the final rate.

    Args:
        progress: share of the run that is done.
        settings: warm-up, final rate, steps.
    """
    rise = settings.warmup_fraction
    if progress < rise:
        return (progress * settings.steps + 1) / (rise * settings.steps + 1)
    done = min(1.0, (progress - rise) / (1 - rise))
    lead = 0.5 * (1 + math.cos(math.pi * done))
    return settings.final_rate + (1 - settings.final_rate) * lead
