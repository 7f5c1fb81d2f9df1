#!/usr/bin/env bash
# Runs tests/gpu, bench/gpu.py and the benchmark's GPU cases on a machine with CUDA and
# its own torch, without a registry. What else is needed is carried as wheels
# (tests/gpu/wheels.txt).
#
#   tests/gpu/run.sh WHEELS RESULTS [DIRECTORY] [GIB] [COMMIT] [STEPS]
#
# WHEELS     folder of wheels; they are installed beside the machine's own packages
# RESULTS    folder for tests.txt, gpu.jsonl and gpupeers.jsonl
# DIRECTORY  where checkpoints are written; by default a new temporary folder
# GIB        size of the state of bench/gpu.py; 4 by default
# COMMIT     what is measured, where the tree comes without its repository
# STEPS      some of "tests figures peers"; by default all, which may take 18 minutes
set -euo pipefail
wheels=$(realpath "${1:?the folder of wheels}")
mkdir -p "${2:?the folder for results}"
results=$(realpath "$2")
[ -z "${3:-}" ] || { mkdir -p "$3" && directory=$(realpath "$3"); }
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

site=$(mktemp -d)
scratch=$(mktemp -d)
trap 'rm -rf "$site" "$scratch"' EXIT
directory=${directory:-$scratch}
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --disable-pip-version-check --root-user-action ignore --target "$site" "$wheels"/*.whl
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

python3 - <<'PYTHON'
import sys

import forbiddenfruit  # blockbuster needs it
import hypothesis
import pytest_asyncio
import pytest_timeout
import torch

import aiockpt.machinery
from aiockpt.staging.cuda_driver import CudaDriver
from aiockpt.staging.driver import DeviceError

print("python", sys.version.split()[0], "torch", torch.__version__)
if not torch.cuda.is_available():
    sys.exit("no CUDA device: torch.cuda.is_available() is False")
try:
    CudaDriver().check_usable()
except DeviceError as error:
    sys.exit(f"no CUDA device: {error}")
print("device", torch.cuda.get_device_name())
PYTHON

tests() {
    # Plugins that the machine has of its own stay out.
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 timeout --kill-after=10 240 \
        python3 -m pytest tests/gpu -p no:cacheprovider -q \
        -p pytest_asyncio.plugin -p pytest_timeout -p _hypothesis_pytestplugin \
        --timeout=60 2>&1 | tee "$results/tests.txt"
}

figures() {
    timeout --kill-after=10 300 python3 -m bench.gpu --directory "$directory" \
        --results "$results/gpu.jsonl" --gib "$gib" ${commit:+--commit "$commit"}
}

peers() {
    # Interrupted, it takes away what it has written.
    timeout --signal=INT --kill-after=20 540 python3 -m bench gpu_load gpu_into gpu_save \
        --dir "$directory" --out "$results/gpupeers.jsonl" ${commit:+--commit "$commit"}
}

gib=${4:-4} commit=${5:-} outcome=0
# What follows a step is run even if that fails; the script fails then, too. None is
# waited for longer than a lent machine is there.
for step in ${6:-tests figures peers}; do
    "$step" || outcome=$?
done
exit "$outcome"
