"""`python -m demo`: the demo from the sample model to the server's last metric."""

import argparse
import sys
import time
from pathlib import Path

from demo.conversation import Conversation
from demo.server import DemoError, Server, leave_on_signals
from demo.setting import serve_arguments, shell_line
from flux_vllm.cli.console import CommandError
from flux_vllm.cli.sample_model import SMOLLM2, is_sample_model, make_sample_model
from flux_vllm.router.checkpoint import read_info

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=REPOSITORY / "models" / SMOLLM2.name, help="made if missing"
    )
    parser.add_argument(
        "--log", type=Path, default=REPOSITORY / "runs" / "demo-server.log", help="server's log"
    )
    args = parser.parse_args()
    leave_on_signals()
    try:
        _demonstrate(args.model, args.log)
    except (CommandError, DemoError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the server is stopped", file=sys.stderr)
        return 130
    return 0


def _demonstrate(model: Path, log: Path) -> None:
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:3.0f} s] {text}", flush=True)

    if is_sample_model(model):
        say(f"the sample model is in {model}")
    else:
        say(f"making the sample model, {SMOLLM2.name}, in {model}")
    make_sample_model(model, lambda text: say(f"  {text}"))
    router = read_info(model)
    say(
        f"its trained router lies beside it: SPARSE is the first {router.sink_tokens} and the "
        f"latest {router.window_tokens} tokens"
    )
    arguments = serve_arguments(model)
    say("starting the server (about half a minute):")
    print(f"\n  flux-vllm serve {shell_line(arguments)}\n", flush=True)
    with Server(arguments, log) as server:
        say(f"the server answers at {server.url}/v1")
        conversation = Conversation(server, model, router.num_layers)
        conversation.ask_chat()
        conversation.ask_code_word()
        conversation.show_routes()
        print()
        say("stopping the server")
    say("done")


if __name__ == "__main__":
    sys.exit(main())
