#!/usr/bin/env bash
# What the root tests need from Debian: a trixie tree with Python 3.13, made once and kept outside of the checkout.
set -euo pipefail
trees="${REMOTED_TEST_TREES:-${XDG_CACHE_HOME:-$HOME/.cache}/remoted-tests}"
need=()
for tool in debootstrap strace; do command -v "$tool" >/dev/null || need+=("$tool"); done
if [ "${#need[@]}" -gt 0 ]; then apt-get update -qq; apt-get install -y -qq "${need[@]}" >/dev/null; fi
mkdir -p "$trees"
if [ ! -f "$trees/trixie.ready" ]; then
  rm -rf "$trees/trixie"
  mirror=$({ cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null || true; } | sed -n 's/^URIs: //p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' | head -n 1)
  echo "making a trixie tree in $trees (about a minute)"
  debootstrap --variant=minbase --include=python3,python3-venv trixie "$trees/trixie" "$mirror" >"$trees/trixie.log" 2>&1 || { tail -n 20 "$trees/trixie.log"; exit 1; }
  touch "$trees/trixie.ready"
fi
