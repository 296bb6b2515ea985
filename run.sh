#!/usr/bin/env bash
# ./run.sh            compare the methods on real digits: prints a table, says where the plot is
# ./run.sh test ...   run the tests (further words go to pytest)
# ./run.sh lint       run ruff, mypy and the import contracts
# Makes a virtual environment beside this file (or in $EAST_VENV) the first time. PYTHON chooses the Python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
venv=${EAST_VENV:-$PWD/.venv}
python=${PYTHON:-python3}
tested="torch==2.14.1 torchvision==0.29.1" # installed where the Python has neither

install() { # install EXTRAS...: once for each state of setup.cfg
    local stamp
    stamp="$venv/.installed-$1-$(cksum < setup.cfg | cut -d' ' -f1)"
    [ -e "$stamp" ] && return
    if [ ! -x "$venv/bin/python" ]; then
        echo "making $venv" >&2
        "$python" -m venv --system-site-packages "$venv" # what a virtual environment holds is not seen from another one
        if "$venv/bin/python" -c 'import importlib.util as u, sys; sys.exit(bool(u.find_spec("torch") and u.find_spec("torchvision")))'; then
            "$python" -m venv --clear "$venv"
            # shellcheck disable=SC2086
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check $tested
        fi
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
    touch "$stamp"
}

cores=$("$python" -c 'import os; print(os.cpu_count() or 1)')
case ${1:-compare} in
compare)
    install train
    exec "$venv/bin/python" -m east_plugins compare --config configs/digits_east.yaml \
        --jobs "$((cores < 15 ? cores : 15))" --threads 1 --out runs/digits
    ;;
test)
    install train,test
    OMP_NUM_THREADS=1 exec "$venv/bin/python" -m pytest --numprocesses "$((cores < 8 ? cores : 8))" "${@:2}"
    ;;
lint)
    install train,test
    "$venv/bin/python" -m ruff check .
    "$venv/bin/python" -m ruff format --check .
    "$venv/bin/python" -m mypy
    exec "$venv/bin/lint-imports" --no-cache
    ;;
*)
    echo "run.sh: unknown command '$1'; allowed: nothing at all, test, lint" >&2
    exit 2
    ;;
esac
