#!/usr/bin/env bash
# What the root tests need from Debian, made once and kept outside of the checkout: a trixie tree (Python 3.13) and a
# bookworm tree, both with systemd, and what the system's daemon runs on: an environment that is root's and that every user may read.
set -euo pipefail
trees="${REMOTED_TEST_TREES:-${XDG_CACHE_HOME:-$HOME/.cache}/remoted-tests}"
shared="${REMOTED_TEST_SHARED:-/var/lib/remoted-tests}"
checkout="$(cd "$(dirname "$0")/../.." && pwd)"

need=()
for tool in debootstrap strace; do command -v "$tool" >/dev/null || need+=("$tool"); done
command -v systemd-nspawn >/dev/null || need+=(systemd-container)
[ -x /usr/bin/python3 ] && /usr/bin/python3 -c 'import venv, ensurepip' 2>/dev/null || need+=(python3 python3-venv)
if [ "${#need[@]}" -gt 0 ]; then apt-get update -qq; apt-get install -y -qq "${need[@]}" >/dev/null; fi
mkdir -p "$trees"

make_tree() { # suite, packages
  [ ! -f "$trees/$1.ready" ] || [ ! -x "$trees/$1/lib/systemd/systemd" ] || return 0
  rm -rf "${trees:?}/$1"
  mirror=$({ cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list 2>/dev/null || true; } | sed -n 's/^URIs: //p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' | head -n 1)
  echo "making a $1 tree in $trees (about a minute)"
  debootstrap --variant=minbase --include="$2" "$1" "$trees/$1" "$mirror" >"$trees/$1.log" 2>&1 || { tail -n 20 "$trees/$1.log"; exit 1; }
  touch "$trees/$1.ready"
}
make_tree trixie systemd,systemd-sysv,dbus,python3,python3-venv,procps
make_tree bookworm systemd,systemd-sysv,dbus,python3,python3-venv,procps

if ! cmp -s "$checkout/uv.lock" "$shared/venv/uv.lock"; then
  rm -rf "$shared/venv"
  install -d -m 755 "$shared"
  umask 022
  (cd "$checkout" && UV_PROJECT_ENVIRONMENT="$shared/venv" UV_LINK_MODE=copy .venv/bin/uv sync --quiet --frozen --python /usr/bin/python3 --no-managed-python --extra daemon --no-default-groups --no-install-project)
  cp "$checkout/uv.lock" "$shared/venv/uv.lock"
fi
