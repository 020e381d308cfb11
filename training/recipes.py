"""Ready-made runs: functions that return a full config."""

from training.config import (
    DataSettings,
    EvalConfig,
    LossSettings,
    OptimizerSettings,
    RouterSettings,
    SystemSettings,
    TrainConfig,
)

TASKS = (
    "needle",
    "multi_key",
    "variable_tracking",
    "repeat_end",
    "list_end",
    "continue_text",
    "code_completion",
    "few_shot",
    "state_tracking",
    "arithmetic",
)


def budget(model: str = "", out: str = "") -> TrainConfig:
    """Spend the fewest FULL layers within a budget of divergence, on prompts like yours."""
    return TrainConfig(
        model=model,
        out=out,
        data=DataSettings(min_tokens=1024, max_tokens=32000),
        optimizer=OptimizerSettings(
            steps=400, batch_size=256, learning_rate=3e-3, weight_decay=0.5
        ),
        system=SystemSettings(compile_layers=True),
    )


def online(model: str = "", out: str = "") -> TrainConfig:
    """Spend the same budget by sampled routes, the model running at every update."""
    return TrainConfig(
        model=model,
        out=out,
        router=RouterSettings(
            pools=("tail:1", "tail:16", "tail:128", "head:128"),
            context_depths=(0.5, 0.75, 1.0),
            widths=(64, 64, 64, 32),
        ),
        data=DataSettings(min_tokens=1024, max_tokens=32000),
        loss=LossSettings(objective="online"),
        optimizer=OptimizerSettings(steps=600, batch_size=12, learning_rate=1.5e-3),
        system=SystemSettings(compile_layers=True),
    )


def paper(model: str = "", out: str = "") -> TrainConfig:
    """Follow arXiv 2604.07394: 300 steps of 48 prompts up to 64K tokens, for 8 GPUs of 80 GB."""
    return TrainConfig(
        model=model,
        out=out,
        router=RouterSettings(
            pools=("ends:100",),
            context_depths=(),
            widths=(),
            sink_tokens=128,
            window_tokens=1024,
            sparse_pattern="streaming",
            full_bias=4.5,
        ),
        data=DataSettings(tasks=TASKS, min_tokens=4096, max_tokens=65536),
        loss=LossSettings(objective="paper", multiplier_rate=1e-3),
        optimizer=OptimizerSettings(steps=300, batch_size=48, learning_rate=5e-4),
        system=SystemSettings(checkpoint_layers=True, shard_model=True),
    )


def tiny(model: str = "", out: str = "") -> TrainConfig:
    """Try everything on the CPU in a minute; what comes out is of no use."""
    return TrainConfig(
        model=model,
        out=out,
        router=RouterSettings(
            probe=(16, 48),
            pools=("tail:32",),
            widths=(16, 16, 16, 16),
            sink_tokens=16,
            window_tokens=64,
            full_bias=1.0,
        ),
        data=DataSettings(min_tokens=256, max_tokens=384, workers=0),
        optimizer=OptimizerSettings(steps=10, batch_size=4, learning_rate=5e-3),
        system=SystemSettings(device="cpu", dtype="float32", save_every=5),
    )


def evaluation(model: str = "", router: str = "", out: str = "") -> EvalConfig:
    """Evaluate as the project reports it: 400 prompts a task and length."""
    return EvalConfig(
        model=model,
        router=router,
        out=out,
        data=DataSettings(tasks=TASKS),
        variants=("plain", "begun", "wording", "wrapper:instruction"),
    )


RECIPES = {"budget": budget, "online": online, "paper": paper, "tiny": tiny}
