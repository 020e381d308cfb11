#!/usr/bin/env bash
# Installs the programs, not Python packages, that end-to-end tests drive. `.ci/run` calls this;
# without them those tests are skipped. What is there already is left alone.
set -euo pipefail

fail() {
    printf '\ntest services: %s\n' "$*" >&2
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "expected root or sudo to install $package with apt-get, found neither." \
            "Install $package yourself and run this again."
    fi
}

# need COMMAND PACKAGE: install the Debian package unless its command is there.
need() {
    local command=$1 package=$2
    command -v "$command" >/dev/null && return
    command -v apt-get >/dev/null ||
        fail "expected the command $command, found neither it nor apt-get." \
            "Install $command with this system's package manager and run this again."
    as_root apt-get update -qq || fail "'apt-get update' failed (see above)."
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        "$package" >/dev/null || fail "'apt-get install $package' failed (see above)."
    command -v "$command" >/dev/null ||
        fail "expected the command $command after installing $package, found none." \
            "On Ubuntu, whose chromium package is a snap, install a browser named $command yourself."
}

need chromium chromium
need prometheus prometheus # promtool is in it
