#!/bin/sh
# Installs what the tests need and runs all of them.
set -eu
cd "$(dirname "$0")"

# The queue tests run against Redis too; without a server that half says that it was skipped.
if ! command -v redis-server >/dev/null 2>&1 && ! command -v valkey-server >/dev/null 2>&1; then
    if command -v apt-get >/dev/null 2>&1; then
        sudo=""
        [ "$(id -u)" = 0 ] || sudo="sudo"
        $sudo apt-get install -y --no-install-recommends redis-server >/dev/null 2>&1 ||
            { $sudo apt-get update -qq && $sudo apt-get install -y --no-install-recommends redis-server; } ||
            echo "redis-server could not be installed: its half of the queue tests will be skipped" >&2
    else
        echo "no redis-server on the PATH: its half of the queue tests will be skipped" >&2
    fi
fi

if command -v cargo-nextest >/dev/null 2>&1; then
    exec cargo nextest run --workspace --no-fail-fast "$@"
fi
exec cargo test --workspace --no-fail-fast "$@"
