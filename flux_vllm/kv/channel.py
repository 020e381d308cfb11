"""Routes on their way from the worker to the scheduler: beside the tokens of the step they came in.

vLLM has no field for them that does without a KV connector. A step's output is a plain object that
travels by pickle, so an attribute of it arrives.
"""

from typing import Any

import numpy as np
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from flux_vllm.routing.readback import PendingReadback

_FIELD = "flux_routes"


def send_routes(output: Any, decided: PendingReadback) -> Any:
    """Send what was decided for a step with its output.

    Args:
        output: of `sample_tokens`: a ModelRunnerOutput, or an AsyncModelRunnerOutput, which is
            still on its way.
        decided: for the step; on a GPU, on its way too.

    Returns: the output in its place.
    Raises: AttributeError: the output takes no routes.
    """
    if isinstance(output, AsyncModelRunnerOutput):
        return _RoutedOutput(output, decided)
    _attach(output, decided)
    return output


def decided_routes(output: ModelRunnerOutput) -> dict[str, np.ndarray]:
    """Return by request the routes that came with an output: [layers of the model] int8."""
    return getattr(output, _FIELD, {})


class _RoutedOutput(AsyncModelRunnerOutput):
    """An output whose tokens and routes arrive on the host later."""

    def __init__(self, output: AsyncModelRunnerOutput, decided: PendingReadback) -> None:
        self._output = output
        self._decided = decided

    def get_output(self) -> ModelRunnerOutput:
        """Wait for both."""
        output = self._output.get_output()
        _attach(output, self._decided)
        return output

    def get_kv_connector_output(self) -> Any:
        """Return what a KV connector gave for the step; vLLM 0.33 asks where `get_output` fails."""
        return self._output.get_kv_connector_output()


def _attach(output: ModelRunnerOutput, decided: PendingReadback) -> None:
    setattr(output, _FIELD, decided.by_request())
