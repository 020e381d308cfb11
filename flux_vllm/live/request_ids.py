"""From the id that a client knows to the ids under which the engine ran its request.

vLLM 0.32 and 0.33 make one engine request of each prompt and each of n choices:

    completions   [CHOICE_]cmpl-NAME-PROMPT-RANDOM
    chat          [CHOICE_]chatcmpl-NAME[_PROMPT]-RANDOM
    responses     [CHOICE_]RESPONSE_ID_TURN-RANDOM

NAME is the header X-Request-Id, else the body's `request_id`, else random; CHOICE stands there with
n > 1; RANDOM (8 hexadecimal digits) is left out under VLLM_DISABLE_REQUEST_ID_RANDOMIZATION. What
precedes PROMPT is the `id` of the response.
"""

import re
from dataclasses import dataclass

_COMPLETION, _CHAT = "cmpl-", "chatcmpl-"


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a client's request an engine request was."""

    prompt: int
    """Index of the prompt (completions, batched chat) or turn (responses)."""
    choice: int
    """Index among n choices."""


class RequestName:
    """Recognises the engine's ids of one client request.

    Args:
        name: a response's `id`, or the X-Request-Id that the client sent.
    """

    def __init__(self, name: str) -> None:
        self._text = name.encode()
        self._patterns = [
            re.compile(rf"(?:(?P<choice>\d+)_)?{_body(full)}(?:-[0-9a-f]{{8}})?")
            for full in (name, _COMPLETION + name, _CHAT + name)
        ]

    def part(self, engine_id: bytes) -> Part | None:
        """Say which part of the request an engine id (UTF-8) names; None: of another request."""
        # Nearly always not in it, which is much cheaper to see. An id too long to keep is empty.
        if not engine_id or self._text not in engine_id:
            return None
        for pattern in self._patterns:
            match = pattern.fullmatch(engine_id.decode(errors="replace"))
            if match is not None:
                return Part(int(match["prompt"] or 0), int(match["choice"] or 0))
        return None


def _body(full: str) -> str:
    index = r"-(?P<prompt>\d+)" if full.startswith(_COMPLETION) else r"(?:_(?P<prompt>\d+))?"
    return re.escape(full) + index
