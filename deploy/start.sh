#!/usr/bin/env bash
# Serves MODEL with layer routes: start.sh MODEL [arguments of vllm serve]
#
# FLUX_PORT (8000) is where it listens and where health.py asks, so --port is refused.
# VLLM_PLUGINS names the plugins that vLLM loads; one that adds pages (/flux) only if it is named.
set -euo pipefail

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    echo "flux-vllm: expected a model first, found '${1:-nothing}';" \
        "run: docker run --gpus all IMAGE MODEL [arguments of vllm serve]" >&2
    exit 2
fi
model=$1
shift
for argument in "$@"; do
    if [ "${argument%%=*}" = --port ]; then
        echo "flux-vllm: expected the port in FLUX_PORT, where the health check asks too, found" \
            "'--port'; leave it out and set the environment variable, as in FLUX_PORT=9000" >&2
        exit 2
    fi
done
export VLLM_PLUGINS=${VLLM_PLUGINS:-flux,flux_live}
exec flux-vllm serve "$model" --attention-backend flux --port "${FLUX_PORT:-8000}" "$@"
