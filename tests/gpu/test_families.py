"""Families and formats of weights on a GPU, eager: formats that the CPU cannot run among them.

Oracles: see tests/helpers/families.py.
"""

from dataclasses import replace
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

# Activations of float8 err so much that SPARSE must change more for a wrong route to be noticed.
LONGER = {"lengths": (161, 500, 900, 1300), "sparse": (0, 1, 3)}
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
    ),
} | {f"llama-{form}": replace(quantized_family(form), **LONGER) for form in FORMS}


@pytest.mark.parametrize("name", FAMILIES)
def test_policies(name: str, tmp_path: Path) -> None:
    case = make_case(FAMILIES[name], tmp_path)
    check_fixed_routes(case)
    check_router(case)
