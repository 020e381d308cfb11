"""Families and formats of weights on a GPU, eager: formats that the CPU cannot run among them.

Oracles: see tests/helpers/families.py.
"""

from pathlib import Path

import pytest
from transformers import SmolLM3Config

from tests.helpers.families import (
    Family,
    check_fixed_routes,
    check_router,
    make_case,
    quantized_family,
)
from tests.helpers.quantized import FORMS

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

SHARED = {"gpu_memory_utilization": 0.1}  # several processes share the GPU
FAMILIES = {
    # By transformers' own code.
    "smollm3": Family(
        SmolLM3Config,
        {"no_rope_layers": [1, 1, 0, 1]},
        routed=(0, 1, 3),
        unrotated=(2,),
        sparse=(0, 3),
        dtype="bfloat16",
        head_dim=64,
        arguments=SHARED,
    ),
} | {f"llama-{form}": quantized_family(form, SHARED) for form in FORMS}


@pytest.mark.parametrize("name", FAMILIES)
def test_policies(name: str, tmp_path: Path) -> None:
    case = make_case(FAMILIES[name], tmp_path)
    check_fixed_routes(case)
    check_router(case)
