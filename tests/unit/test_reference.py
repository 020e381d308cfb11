"""Pins the reference that every server test trusts.

Oracle: transformers' own eager attention, each layer under a mask written here as sets of keys.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.helpers.models import (
    random_prompt,
    write_random_router,
    write_tiny_llama,
    write_tiny_qwen3,
)
from tests.helpers.reference import (
    FULL,
    SPARSE,
    ReferenceModel,
    ReferenceRouter,
    Request,
    SparsePattern,
)
from tests.unit.test_oracle import keys_by_definition

PATTERN = SparsePattern(sink_tokens=20, window_tokens=50, block_size=16)
MIXED = [SPARSE, FULL, FULL, SPARSE]
# Both sides are float32 and sum in another order; the server tests allow 0.02.
ROUNDING = 5e-4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: products this small lose more to waiting than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = {"llama": write_tiny_llama, "qwen3": write_tiny_qwen3}[request.param]
    return write(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(family: Path) -> ReferenceModel:
    return ReferenceModel(family)


@pytest.fixture(scope="module")
def router(family: Path, tmp_path_factory: pytest.TempPathFactory) -> ReferenceRouter:
    path = write_random_router(
        tmp_path_factory.mktemp("router"),
        num_layers=4,
        head_dim=32,
        pool_tokens=40,
        model_folder=family,
    )
    return ReferenceRouter.load(path)


def _eager_logprobs(
    folder: Path, tokens: Sequence[int], see: Callable[[int, int], set[int]]
) -> torch.Tensor:
    """Run transformers' eager attention once, the query at p of a layer seeing `see(layer, p)`."""
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )

    def give_mask(_module: nn.Module, args: tuple, kwargs: dict, layer: int) -> tuple:
        mask = torch.full((len(tokens), len(tokens)), torch.finfo(torch.float32).min)
        for p in range(len(tokens)):
            mask[p, sorted(see(layer, p))] = 0.0
        return args, kwargs | {"attention_mask": mask[None, None]}

    for layer, block in enumerate(plain.model.layers):
        block.self_attn.register_forward_pre_hook(partial(give_mask, layer=layer), with_kwargs=True)
    with torch.inference_mode():
        logits = plain(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return torch.log_softmax(logits, dim=-1)


def _assert_logprobs(request: Request, expected: torch.Tensor) -> None:
    """Compare what a request computed of its prompt and output with a whole table [tokens, V]."""
    prompt_len = len(request.prompt)
    computed = request.prompt_logprobs.isfinite().nonzero()[:, 0]
    targets = torch.tensor(request.prompt)[computed]
    prompt = expected[computed - 1, targets]
    torch.testing.assert_close(request.prompt_logprobs[computed], prompt, rtol=0, atol=ROUNDING)
    output = torch.stack(request.output_logprobs)
    rows = expected[prompt_len - 1 : prompt_len - 1 + len(output)]
    torch.testing.assert_close(output, rows, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("chunks", [None, [97, 97, 6], [1] * 5 + [195]], ids=["one", "97", "ones"])
def test_full_equals_plain_transformers(
    family: Path, model: ReferenceModel, implementation: str, chunks: list[int] | None
) -> None:
    prompt = random_prompt(200, seed=1)
    request = model.run(
        prompt,
        chunks,
        pattern=PATTERN,
        routes=[FULL] * 4,
        num_decode=5,
        keep_prompt_table=True,
    )
    plain = AutoModelForCausalLM.from_pretrained(
        family, dtype=torch.float32, attn_implementation=implementation
    )
    with torch.inference_mode():
        output = plain(torch.tensor([prompt]), use_cache=True)
        table = torch.log_softmax(output.logits[0], dim=-1)
        torch.testing.assert_close(request.prompt_table[1:], table[:-1], rtol=0, atol=ROUNDING)
        row = table[-1]
        for token, logprobs in zip(request.output_tokens, request.output_logprobs, strict=True):
            torch.testing.assert_close(logprobs, row, rtol=0, atol=ROUNDING)
            assert token == int(row.argmax())
            step = torch.tensor([[token]])
            output = plain(step, past_key_values=output.past_key_values, use_cache=True)
            row = torch.log_softmax(output.logits[0, -1], dim=-1)


@pytest.mark.parametrize("routes", [MIXED, [SPARSE] * 4], ids=["mixed", "sparse"])
def test_routes_equal_eager_attention_under_set_masks(
    family: Path, model: ReferenceModel, routes: list[int]
) -> None:
    request = model.run(
        random_prompt(130, seed=2), [60, 70], pattern=PATTERN, routes=routes, num_decode=20
    )

    def see(layer: int, p: int) -> set[int]:
        phase = "prefill" if p < 130 else "decode"
        return keys_by_definition(p, routes[layer], phase, PATTERN)

    _assert_logprobs(request, _eager_logprobs(family, request.tokens, see))
    assert request.greedy_tokens == request.output_tokens


def test_history_of_another_request_keeps_its_routes(family: Path, model: ReferenceModel) -> None:
    first = model.run(random_prompt(120, seed=3), pattern=PATTERN, routes=MIXED)
    others = [FULL, SPARSE, SPARSE, FULL]
    prompt = first.prompt[:96] + random_prompt(60, seed=4)
    second = model.run(
        prompt,
        [29, 31],
        pattern=PATTERN,
        routes=others,
        history=first.history.first(96),
        num_decode=4,
    )

    def see(layer: int, p: int) -> set[int]:
        route = MIXED[layer] if p < 96 else others[layer]
        return keys_by_definition(p, route, "prefill" if p < 156 else "decode", PATTERN)

    _assert_logprobs(second, _eager_logprobs(family, second.tokens, see))
    assert int(second.prompt_logprobs.isnan().sum()) == 97
    assert len(first.history) == 120


def test_second_turn_reads_what_decode_wrote(family: Path, model: ReferenceModel) -> None:
    first = model.run(random_prompt(90, seed=5), pattern=PATTERN, routes=MIXED, num_decode=30)
    assert len(first.history) == 119
    prompt = first.tokens + random_prompt(20, seed=6)
    second = model.run(
        prompt, pattern=PATTERN, routes=MIXED, history=first.history.first(112), num_decode=2
    )

    def see(layer: int, p: int) -> set[int]:
        phase = "decode" if 90 <= p < 112 or p >= len(prompt) else "prefill"
        return keys_by_definition(p, MIXED[layer], phase, PATTERN)

    _assert_logprobs(second, _eager_logprobs(family, second.tokens, see))


def test_preempted_request_keeps_its_routes(
    family: Path, model: ReferenceModel, router: ReferenceRouter
) -> None:
    request = Request(model, random_prompt(200, seed=7), PATTERN, router=router)
    request.replay([(0, 128), (0, 128), (128, 72), *((200 + t, 1) for t in range(9))])
    routes, before = list(request.routes), list(request.output_tokens)
    # Ten tokens are out and nine computed: all 210 come again, then one more is decoded.
    request.replay([(0, 170), (170, 40, "prefill"), (210, 1)])
    assert request.output_tokens[:10] == before
    assert all(step.routes == routes for step in request.steps)

    def see(layer: int, p: int) -> set[int]:
        return keys_by_definition(p, routes[layer], "prefill" if p < 210 else "decode", PATTERN)

    expected = _eager_logprobs(family, request.tokens, see)
    last = torch.stack(request.output_logprobs[10:])
    torch.testing.assert_close(last, expected[209:211], rtol=0, atol=ROUNDING)


def test_hidden_tokens_do_not_matter_when_sparse(tmp_path: Path) -> None:
    model = ReferenceModel(write_tiny_llama(tmp_path, layers=1))
    prompt = random_prompt(200, seed=12)
    poisoned = list(prompt)
    poisoned[60] = (prompt[60] + 1) % 512

    def last(tokens: list[int], route: int) -> torch.Tensor:
        request = model.run(
            tokens, pattern=PATTERN, routes=[route], num_decode=3, forced_tokens=[1, 2, 3]
        )
        return torch.stack(request.output_logprobs)

    assert torch.equal(last(prompt, SPARSE), last(poisoned, SPARSE))
    assert (last(prompt, FULL) - last(poisoned, FULL)).abs().max() > 1e-3


@pytest.mark.parametrize("layer", range(4))
def test_a_wrong_route_shows(model: ReferenceModel, layer: int) -> None:
    prompt = random_prompt(400, seed=13)
    right = model.run(prompt, pattern=PATTERN, routes=MIXED, num_decode=6)
    routes = list(MIXED)
    routes[layer] = 1 - routes[layer]
    wrong = model.run(
        prompt, pattern=PATTERN, routes=routes, num_decode=6, forced_tokens=right.output_tokens
    )
    assert (right.prompt_logprobs - wrong.prompt_logprobs)[200:].abs().median() > 0.1
    for a, b in zip(right.output_logprobs, wrong.output_logprobs, strict=True):
        assert (a - b).abs().max() > 0.2


@pytest.mark.parametrize(("sinks", "window"), [(19, 50), (21, 50), (20, 49), (20, 51)])
def test_one_wrong_key_shows(model: ReferenceModel, sinks: int, window: int) -> None:
    prompt = random_prompt(300, seed=14)
    wrong = SparsePattern(sinks, window, PATTERN.block_size)
    a = model.run(prompt, pattern=PATTERN, routes=MIXED).prompt_logprobs
    b = model.run(prompt, pattern=wrong, routes=MIXED).prompt_logprobs
    assert (a - b)[100:].abs().max() > 0.1


def test_greedy_decoding_does_not_repeat_itself(model: ReferenceModel) -> None:
    request = model.run(random_prompt(200, seed=15), pattern=PATTERN, routes=MIXED, num_decode=30)
    assert len(set(request.output_tokens)) > 15


def test_routes_vary_from_prompt_to_prompt(model: ReferenceModel, router: ReferenceRouter) -> None:
    prompts = [random_prompt(80 + 50 * i, seed=100 + i) for i in range(16)]
    p_full = torch.stack([router.p_full(model, prompt) for prompt in prompts])
    share = (p_full >= 0.5).float().mean(dim=0)
    assert ((share > 0.1) & (share < 0.9)).all()
    assert ((p_full - 0.5).abs() > 0.01).float().mean() > 0.9


def test_impossible_steps_are_refused(model: ReferenceModel) -> None:
    prompt = random_prompt(40, seed=16)
    run = partial(model.run, pattern=PATTERN, routes=MIXED)
    done = run(prompt)
    with pytest.raises(ValueError, match="chunks: expected lengths that sum to 40"):
        run(prompt, [16, 16])
    with pytest.raises(ValueError, match="history: expected the first tokens"):
        run(random_prompt(60, seed=17), history=done.history)
    with pytest.raises(ValueError, match="history: expected the first tokens"):
        run(prompt, history=done.history)
    with pytest.raises(ValueError, match="length: expected 1 to 1, got 2"):
        done.step(2)
    with pytest.raises(ValueError, match="routes, router"):
        run(prompt, routes=None)
