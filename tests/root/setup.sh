#!/usr/bin/env bash
# What the root tests need from Debian, made once and kept outside of the checkout: a trixie tree (Python 3.13) and a
# bookworm tree, both with systemd; a kernel for a computer in software, and the wheels of what it installs; and what the
# system's daemon runs on: an environment that is root's and that every user may read.
set -euo pipefail
trees="${REMOTED_TEST_TREES:-${XDG_CACHE_HOME:-$HOME/.cache}/remoted-tests}"
shared="${REMOTED_TEST_SHARED:-/var/lib/remoted-tests}"
checkout="$(cd "$(dirname "$0")/../.." && pwd)"

need=()
for tool in debootstrap strace; do command -v "$tool" >/dev/null || need+=("$tool"); done
command -v systemd-nspawn >/dev/null || need+=(systemd-container)
command -v mke2fs >/dev/null || need+=(e2fsprogs)
[ -x /usr/bin/python3 ] && /usr/bin/python3 -c 'import venv, ensurepip' 2>/dev/null || need+=(python3 python3-venv)
if [ "${#need[@]}" -gt 0 ]; then apt-get update -qq; apt-get install -y -qq "${need[@]}" >/dev/null; fi
if ! command -v qemu-system-x86_64 >/dev/null || ! command -v qemu-img >/dev/null; then
  apt-get update -qq && apt-get install -y -qq --no-install-recommends qemu-system-x86 qemu-utils >/dev/null # without its windows and sounds
fi
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

# Unpacked and not installed: the host's own /boot is none of our business.
unpack() { # packages
  apt-get download -qq "$@" 2>/dev/null || { apt-get update -qq; apt-get download -qq "$@"; }
  for package in "$@"; do dpkg-deb -x "$package"_*.deb .; done
}
make_machine() {
  [ ! -f "$trees/machine/ready" ] || return 0
  echo "making a kernel and its first file system in $trees/machine"
  rm -rf "$trees/machine" && mkdir -p "$trees/machine/unpacked" && cd "$trees/machine/unpacked"
  kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)
  if [ -z "$kernel" ]; then
    apt-get update -qq
    kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\).*/\1/p' | head -n 1)
  fi
  unpack "${kernel:?apt knows no linux-image-cloud-amd64}" busybox-static
  cp boot/vmlinuz-* ../kernel
  mkdir -p first/bin first/proc first/sys first/dev first/root
  cp bin/busybox first/bin/
  # ext4 is in the kernel itself; in the order of their needs:
  for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk virtio_console; do
    cp "$(find . -path ./first -prune -o -name "$module.ko" -print | grep .)" first/
    echo "insmod /$module.ko"
  done >insert
  { printf '#!/bin/busybox sh\nset -e\n/bin/busybox --install -s /bin\nmount -t devtmpfs dev /dev\n'; cat insert; printf 'while [ ! -b /dev/vda ]; do :; done\nmount -t ext4 /dev/vda /root\nmount --move /dev /root/dev\nexec switch_root /root /sbin/init\n'; } >first/init
  chmod 755 first/init
  (cd first && find . | bin/busybox cpio -o -H newc | gzip) >../first.cpio.gz
  cd .. && rm -rf unpacked && touch ready
}
(make_machine)

# For a Python 3.11 that is offline.
if ! cmp -s "$checkout/uv.lock" "$trees/wheels/uv.lock"; then
  rm -rf "$trees/wheels"
  (cd "$checkout" && .venv/bin/uv export --quiet --frozen --extra daemon --no-default-groups --no-emit-project --no-header -o "$trees/wheels.txt" >/dev/null)
  "$checkout/.venv/bin/python" -m pip download --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary=:all: --python-version 3.11 \
    --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$trees/wheels" -r "$trees/wheels.txt"
  cp "$checkout/uv.lock" "$trees/wheels/uv.lock"
fi

if ! cmp -s "$checkout/uv.lock" "$shared/venv/uv.lock"; then
  rm -rf "$shared/venv"
  install -d -m 755 "$shared"
  umask 022
  (cd "$checkout" && UV_PROJECT_ENVIRONMENT="$shared/venv" UV_LINK_MODE=copy .venv/bin/uv sync --quiet --frozen --python /usr/bin/python3 --no-managed-python --extra daemon --no-default-groups --no-install-project)
  cp "$checkout/uv.lock" "$shared/venv/uv.lock"
fi
