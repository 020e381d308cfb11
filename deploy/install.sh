#!/usr/bin/env bash
# Installs Flux-vLLM into a Python that has vLLM, and changes nothing that is there.
#
#   deploy/install.sh [SOURCE]   SOURCE: the checkout (default: the one this file is in)
#   PYTHON=python3               which Python
#
# The Dockerfile runs it in vLLM's image, tests/deploy in a clean virtual environment.
set -euo pipefail

source=${1:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)'; then
    echo "flux-vllm install: expected vLLM in $("$python" -c 'import sys; print(sys.prefix)'), found none;" \
        "start from vLLM's image, or on a machine of your own run 'make install'" >&2
    exit 1
fi

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$scratch" "$source"
# What is installed stays at its version: the image's torch and vLLM were built for each other.
"$python" -m pip list --format=freeze >"$scratch/constraints.txt"
"$python" -m pip install --quiet --no-cache-dir --constraint "$scratch/constraints.txt" \
    "$scratch"/flux_vllm-*.whl

cd "$scratch" # so that the checkout is not what gets imported
"$python" - <<'PY'
from importlib.metadata import entry_points, version

import flux_vllm

if not any(point.name == "flux" for point in entry_points(group="vllm.general_plugins")):
    raise SystemExit("flux-vllm install: expected the entry point 'flux', found none")
print(f"flux-vllm {version('flux-vllm')} in {flux_vllm.__path__[0]}")
PY
