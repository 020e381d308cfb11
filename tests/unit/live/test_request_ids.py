"""From a client's id to the engine's: nothing of one's own is missed, nothing of others found.

Oracle: the ids that the installed vLLM makes with its own functions; for the parts that only its
servers add, the source of the installed vLLM and of 0.33.
"""

from types import SimpleNamespace

import pytest

from flux_vllm.live.request_ids import Part, RequestName
from tests.unit.test_compat_sources import VERSIONS, package

pytestmark = pytest.mark.vllm


def engine_ids(external: str, choices: int = 1) -> list[bytes]:
    """Make the ids as vLLM does from what a serving class hands to its engine."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.parallel_sampling import ParentRequest

    params = SamplingParams(n=choices)
    request = SimpleNamespace(
        request_id=external, external_req_id=None, sampling_params=params, params=params
    )
    InputProcessor.assign_request_id(request)
    if choices == 1:
        return [request.request_id.encode()]
    parent = ParentRequest(request)
    return [parent.get_child_info(index)[0].encode() for index in range(choices)]


@pytest.mark.parametrize(
    ("asked", "external", "prompt"),
    [
        ("cmpl-a1b2", "cmpl-a1b2-0", 0),
        ("cmpl-a1b2", "cmpl-a1b2-12", 12),
        ("mine", "cmpl-mine-3", 3),
        ("mine", "chatcmpl-mine", 0),
        ("chatcmpl-mine", "chatcmpl-mine", 0),
        ("chatcmpl-mine", "chatcmpl-mine_2", 2),
        ("resp_77", "resp_77_1", 1),
        ("cmpl-odd", "cmpl-cmpl-odd-0", 0),
        ("a.b+c/d[0] é", "cmpl-a.b+c/d[0] é-0", 0),
        ("5_x", "chatcmpl-5_x", 0),
        ("ends-0123abcd", "chatcmpl-ends-0123abcd", 0),
    ],
)
@pytest.mark.parametrize("choices", [1, 2, 11])
def test_own_requests_are_found(asked: str, external: str, prompt: int, choices: int) -> None:
    found = [RequestName(asked).part(engine_id) for engine_id in engine_ids(external, choices)]
    assert found == [Part(prompt, choice) for choice in range(choices)]


@pytest.mark.parametrize(
    ("asked", "external"),
    [
        ("cmpl-a", "cmpl-ab-0"),
        ("cmpl-a", "cmpl-b-a-0"),
        ("cmpl-a", "cmpl-a-b-0"),
        ("chatcmpl-a", "chatcmpl-a-0"),
        ("chatcmpl-a", "chatcmpl-a-0123abcd"),
        ("a", "cmpl-a-0-0"),
        ("a", "cmpl-xa-0"),
        (".*", "cmpl-abc-0"),
        ("cmpl-", "cmpl-abc-0"),
        ("", "cmpl-abc-0"),
        ("0", "cmpl-abc-0"),
    ],
)
@pytest.mark.parametrize("choices", [1, 2])
def test_requests_of_others_are_not(asked: str, external: str, choices: int) -> None:
    assert not any(RequestName(asked).part(found) for found in engine_ids(external, choices))


def test_without_random_suffixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
    assert engine_ids("cmpl-a-2") == [b"cmpl-a-2"]
    assert RequestName("cmpl-a").part(b"cmpl-a-2") == Part(2, 0)
    assert RequestName("a").part(b"1_chatcmpl-a") == Part(0, 1)


def test_an_id_that_was_too_long_is_nobodys() -> None:
    assert RequestName("").part(b"") is None
    assert RequestName("cmpl-a").part(b"") is None


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("file", "lines"),
    [
        (
            "entrypoints/openai/completion/serving.py",
            [
                'request_id = f"cmpl-{self._base_request_id(raw_request, request.request_id)}"',
                'request_id_item = f"{request_id}-{i}"',
            ],
        ),
        (
            "entrypoints/openai/chat_completion/serving.py",
            [
                'f"chatcmpl-{self._base_request_id(raw_request, request.request_id)}"',
                'request_id if len(engine_inputs) == 1 else f"{request_id}_{i}"',
            ],
        ),
        (
            "entrypoints/openai/responses/serving.py",
            ['sub_request_id = f"{request_id}_{sub_request}"'],
        ),
        (
            "v1/engine/input_processor.py",
            ['request.request_id = f"{request.external_req_id}-{random_uuid():.8}"'],
        ),
        ("v1/engine/parallel_sampling.py", ['child_req_id = f"{index}_{self.request_id}"']),
        ("entrypoints/serve/middleware/authenticate.py", ['GUARDED_PREFIX = ("/v1", ']),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_vllm_makes_ids_as_we_read_them(version: str, file: str, lines: list[str]) -> None:
    source = (package(version) / file).read_text()
    for line in lines:
        assert line in source
