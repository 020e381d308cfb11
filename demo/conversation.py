"""What the demo asks the server, and what it shows of the answers."""

import sys
import time
from pathlib import Path
from typing import Any

from openai import OpenAI, OpenAIError

from demo.counters import PHASES, Counters
from demo.long_text import CODE_WORD, CODE_WORD_QUESTION, text_with_code_word
from demo.server import DemoError, Server
from flux_vllm.cli.route_map import legend, render_strips, symbols_for
from flux_vllm.cli.sample_model import SMOLLM2

CHAT_QUESTION = "Never mind the text. Why is the sky blue? Answer in three sentences."


class Conversation:
    """Asks through the `openai` client and keeps what the counters said of each question.

    Args:
        server: the running server.
        model: folder of the model, for its tokenizer.
        num_layers: of the model.
    """

    def __init__(self, server: Server, model: Path, num_layers: int) -> None:
        self._server = server
        self._client = OpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0
        )
        self._model = model
        self._num_layers = num_layers
        self._counters = self._read_counters()
        self._asked: list[tuple[str, Counters]] = []

    def ask_chat(self) -> None:
        """Ask a question of everyday chat after the same long text, which it does not need."""
        text, tokens, _ = text_with_code_word(self._model)
        print(f"\n> [{tokens:,} tokens of Python's own manual]\n> {CHAT_QUESTION}", flush=True)
        # Another beginning: the other question must not find keys that this one's routes made.
        self._ask("chat", f"Some text:\n\n{text}\n\n{CHAT_QUESTION}", max_tokens=120)

    def ask_code_word(self) -> None:
        """Ask for a code word in the middle of a long text.

        Raises: DemoError: the answer lacks it.
        """
        text, tokens, before = text_with_code_word(self._model)
        print(
            f"\n> [{tokens:,} tokens of Python's own manual, with a code word planted after "
            f"{before:,}]\n> {CODE_WORD_QUESTION}",
            flush=True,
        )
        answer = self._ask("code word", f"{text}\n\n{CODE_WORD_QUESTION}", max_tokens=24)
        if CODE_WORD.lower() not in answer.lower():
            raise DemoError(
                f"expected the code word {CODE_WORD!r} in the answer, found {answer!r}; if the "
                "router was just trained, it lost a layer that this question needs"
            )

    def show_routes(self) -> None:
        """Print each question's routes and what they saved.

        Raises: DemoError: the counters do not show one routed request a question.
        """
        symbols = symbols_for(sys.stdout)
        rows = []
        for label, counters in self._asked:
            routes = counters.routes(self._num_layers)
            if max(counters.decisions.values(), default=0) != 1 or -1 in routes:
                raise DemoError(
                    "expected /metrics to count one route for every layer and question, found "
                    f"{counters.decisions} for {label!r}"
                )
            rows.append((label, routes))
        print(f"\nRoute of each layer ({legend(symbols)}), from /metrics:\n")
        print(render_strips(rows, symbols))
        print("\nSaved of the reading that full attention would do:\n")
        width = max(len(label) for label, _ in rows)
        for label, counters in self._asked:
            shares = "   ".join(f"{phase} {counters.saving(phase):4.0%}" for phase in PHASES)
            print(f"{label:<{width}}  {shares}")
        unrouted = self._counters.unrouted_rows
        if unrouted:
            raise DemoError(f"expected flux_unrouted_rows_total 0, found {unrouted}")

    def _ask(self, label: str, question: str, max_tokens: int) -> str:
        begin = time.monotonic()
        first: float | None = None
        pieces: list[str] = []
        usage: Any = None
        try:
            stream = self._client.chat.completions.create(
                model=SMOLLM2.name,
                messages=[{"role": "user", "content": question}],
                max_tokens=max_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            for chunk in stream:
                usage = chunk.usage or usage
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                if piece:
                    first = first or time.monotonic() - begin
                    pieces.append(piece)
                    print(piece, end="", flush=True)
        except OpenAIError as error:
            raise DemoError(
                f"the server failed at the question {label!r}: {error}\nThe end of its log:\n\n"
                f"{self._server.log_tail()}"
            ) from error
        total = time.monotonic() - begin
        print(
            f"\n  ({usage.prompt_tokens:,} prompt tokens, first word after {first or total:.1f} s, "
            f"{usage.completion_tokens} tokens in {total:.1f} s)",
            flush=True,
        )
        earlier, self._counters = self._counters, self._read_counters()
        self._asked.append((label, self._counters.since(earlier)))
        return "".join(pieces)

    def _read_counters(self) -> Counters:
        return Counters.parse(self._server.get("/metrics"))
