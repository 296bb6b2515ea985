#!/usr/bin/env bash
# cuda.sh [--tiny] [--itop CHECKOUT] [--out DIR]    GPU tests, step and update times; at most 9 minutes, table last
# cuda.sh --compiled [--tiny] [--out DIR]          the step times with torch.compile; at most 9 minutes
# cuda.sh experiment PART [--tiny] --data FOLDER_OR_ARCHIVE --out DIR [--epochs N] [--seeds N,N] [--jobs N]
#                                                   one part of the experiment; at most 9 minutes, again to go on
# cuda.sh experiment table --out DIR                the table of what is finished
# Uses the torch that PYTHON (default: python3) has; installs nothing, needs no network. --tiny also runs without CUDA.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here/../..${PYTHONPATH:+:$PYTHONPATH}"
case ${1:-} in
experiment) exec "${PYTHON:-python3}" "$here/cuda_experiment.py" "${@:2}" ;;
*) exec "${PYTHON:-python3}" "$here/cuda_checks.py" "$@" ;;
esac
