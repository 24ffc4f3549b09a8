#!/usr/bin/env bash
# Installs the Debian packages that tests need. Exit status 0 if they are installed.
#
#   ./scripts/debian-packages.sh peer        the Python peer of the tests (support/peers) and openssl: python3-msgpack, python3-zmq, openssl
#   ./scripts/debian-packages.sh promtool    Prometheus, and its own check of metric pages: prometheus
#   ./scripts/debian-packages.sh etcd        a real etcd to register with: etcd-server
#   ./scripts/debian-packages.sh browser     a browser for the page at /ui: chromium, fonts-dejavu-core
set -uo pipefail

case "${1:?peer, promtool, etcd or browser}" in
  peer)
    packages=(python3-msgpack python3-zmq openssl)
    there() { /usr/bin/python3 -c 'import msgpack, zmq' 2>/dev/null && command -v openssl >/dev/null; }
    ;;
  promtool)
    packages=(prometheus)
    there() { command -v promtool >/dev/null; }
    ;;
  etcd)
    packages=(etcd-server)
    there() { command -v etcd >/dev/null; }
    ;;
  browser)
    packages=(chromium fonts-dejavu-core)
    there() { command -v chromium >/dev/null; }
    ;;
  *) echo "debian-packages: peer, promtool, etcd or browser, not $1" >&2; exit 2 ;;
esac

install() {
  DEBIAN_FRONTEND=noninteractive timeout 180 apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null 2>&1
}

there && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "debian-packages: ${packages[*]}: not installed, and only root can install them, with apt-get" >&2
  exit 1
fi
echo "debian-packages: installing ${packages[*]}"
install || { timeout 120 apt-get update -qq >/dev/null 2>&1 && install; }
there || { echo "debian-packages: ${packages[*]}: installation failed (offline?)" >&2; exit 1; }
