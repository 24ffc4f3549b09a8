#!/usr/bin/env bash
# Debian's packages for the Python peer of the tests (test/peers): python3-msgpack and python3-zmq. Exit status 0 where they are there.
set -uo pipefail
packages=(python3-msgpack python3-zmq)

there() { /usr/bin/python3 -c 'import msgpack, zmq' 2>/dev/null; }
install() { timeout 120 apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1; }

there && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "peer-packages: ${packages[*]} are not there, and only root can install them, by apt-get" >&2
  exit 1
fi
echo "peer-packages: installing ${packages[*]}"
install || { timeout 120 apt-get update -qq >/dev/null 2>&1 && install; }
there || { echo "peer-packages: ${packages[*]} could not be installed (offline?)" >&2; exit 1; }
