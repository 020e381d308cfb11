"""How far a probe runs the model."""

from tests.helpers.engine import Engine


def attended(engine: Engine, prompt: list[int]) -> list[int]:
    """Probe a prompt, without a CUDA graph. Returns: layers that attend, in their order."""
    context = engine.worker.vllm_config.compilation_config.static_forward_context
    impls = [layer.impl for layer in context.values()]
    found = []
    for impl in impls:

        def attend(*arguments, impl=impl, attend=impl._attend_probe):
            found.append(impl.binding.layer)
            return attend(*arguments)

        impl._attend_probe = attend
    probe = engine.runtime.probe
    replays, probe._replays = probe._replays, None
    try:
        engine.probe(prompt)
    finally:
        probe._replays = replays
        for impl in impls:
            del impl._attend_probe
    return found
