#!/usr/bin/env bash
# Starts proxy, producer and consumer on this machine and sends the runbook's four prompts through them. --help lists the options.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh
run_program demo "$@"
