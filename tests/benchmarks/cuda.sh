#!/usr/bin/env bash
# cuda.sh [--tiny] [--itop CHECKOUT] [--out DIR]    `bench gpu`: GPU tests, step and update times; at most 9 minutes
# cuda.sh --compiled [--tiny] [--out DIR]           the step times with torch.compile; at most 9 minutes
# cuda.sh --graphed [--tiny] [--out DIR]            the step times as CUDA graphs; at most 4 minutes
# cuda.sh experiment PART ... | experiment table    the command `experiment`: one part; at most 9 minutes, again to go on
# Uses the torch that PYTHON (default: python3) has; installs nothing, needs no network. --tiny also runs without CUDA.
set -euo pipefail
export PYTHONPATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"
[ "${1:-}" = experiment ] || set -- bench gpu "$@"
exec "${PYTHON:-python3}" -m east_plugins "$@"
