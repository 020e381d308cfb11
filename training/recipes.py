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

SMOLLM2_TASKS = (
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


def smollm2(model: str = "", out: str = "") -> TrainConfig:
    """Train SmolLM2-135M-Instruct's router on one GPU in minutes, on prompts to its 8K limit."""
    return TrainConfig(
        model=model,
        out=out,
        # Open prompts end with the question; whatever else is pooled dilutes it (docs/TRAINING.md).
        router=RouterSettings(
            pool_tokens=16,
            pool_prefix=False,
            sink_tokens=64,
            window_tokens=512,
            sparse_pattern="triangle",
            full_bias=2.0,
        ),
        data=DataSettings(
            tasks=SMOLLM2_TASKS,
            min_tokens=1536,
            max_tokens=8000,
            open_fraction=0.75,
            wrappers=("chat", "plain", "dialogue"),
        ),
        loss=LossSettings(
            # Layers go where they are worth most; 0.77 SPARSE came of these (docs/TRAINING.md).
            targets=("retrieval=0.455", "variable_tracking=0.7", "local=0.967", "few_shot=0.9"),
            multiplier_rate=0.02,
            spread_penalty=6.0,
            recent_steps=20,
        ),
        optimizer=OptimizerSettings(
            steps=1000, batch_size=20, learning_rate=1.5e-3, micro_batch_tokens=65536
        ),
        system=SystemSettings(compile_layers=True),
    )


def paper(model: str = "", out: str = "") -> TrainConfig:
    """Follow arXiv 2604.07394: 300 steps of 48 prompts up to 64K tokens, for 8 GPUs of 80 GB."""
    return TrainConfig(
        model=model,
        out=out,
        router=RouterSettings(pool_tokens=96, sink_tokens=128, window_tokens=1024, full_bias=4.5),
        data=DataSettings(min_tokens=4096, max_tokens=65536, chunked_fraction=0.5),
        loss=LossSettings(constraint="absolute", multiplier_rate=1e-3),
        optimizer=OptimizerSettings(
            steps=300, batch_size=48, learning_rate=5e-4, micro_batch_tokens=65536
        ),
        system=SystemSettings(checkpoint_layers=True, shard_model=True),
    )


def tiny(model: str = "", out: str = "") -> TrainConfig:
    """Try everything on the CPU in a minute; what comes out is of no use."""
    return TrainConfig(
        model=model,
        out=out,
        router=RouterSettings(pool_tokens=32, sink_tokens=16, window_tokens=64, full_bias=1.0),
        data=DataSettings(
            tasks=("needle", "repeat_end"), min_tokens=256, max_tokens=384, workers=0
        ),
        optimizer=OptimizerSettings(steps=10, batch_size=4, learning_rate=5e-3),
        system=SystemSettings(device="cpu", dtype="float32", save_every=5),
    )


def evaluation(model: str = "", router: str = "", out: str = "") -> EvalConfig:
    """Evaluate as the project reports it: 400 prompts a task and length."""
    return EvalConfig(
        model=model,
        router=router,
        out=out,
        data=DataSettings(tasks=SMOLLM2_TASKS),
        variants=(
            "plain",
            "begun",
            "wording",
            "wrapper:instruction",
            "chunks:2048",
            "chunks:512",
            "cached",
        ),
    )


RECIPES = {"smollm2": smollm2, "paper": paper, "tiny": tiny}
