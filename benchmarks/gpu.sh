#!/usr/bin/env bash
# The GPU's tests and benchmarks, in under ten minutes: benchmarks/gpu.sh [FOLDER OF WHEELS]
# Needs torch, timm, einops and accelerate; what else is missing comes from the wheels, as from
#   pip download --no-deps --only-binary :all: --dest wheels tyro docstring-parser shtab typeguard datasets dill \
#       multiprocess diffusers xformers nvidia-cuda-runtime-cu12
# of which the last is for xformers, built for CUDA 12, beside a PyTorch for CUDA 13.
# Results go to benchmarks/results/NAME_DEVICE.json.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
if [ $# -gt 0 ]; then
    python3 -m pip install --quiet --no-index --no-deps "$1"/*.whl || exit 1
fi
site=$(python3 -c "import sysconfig; print(sysconfig.get_path('purelib'))")
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$site/nvidia/cuda_runtime/lib
python3 -c "import torch; assert torch.cuda.is_available(), 'expected a CUDA device, got none'" || exit 1

status=0
step() {  # runs one part for so many seconds at most, and goes on with the next whatever comes of it
    echo "== ${*:2}"
    timeout "$1" "${@:2}" || { status=1; echo "failed: ${*:2}"; }
}
step 120 python3 -m pytest -q -m gpu tests/test_cuda.py
step 45 python3 benchmarks/attention.py --tokens_per_batch 33024
step 225 python3 benchmarks/train.py --models S/2 L/2 --rounds 5 --steps_per_round 6
step 75 python3 benchmarks/train.py --models H/2 --arms ours "ours, blocks compiled" "ours, checkpointing" \
    --rounds 5 --steps_per_round 6
step 35 python3 benchmarks/scaling.py
step 40 python3 train.py configs/digits.py --train.run_dir runs/gpu_digits --train.tracker none
step 60 python3 benchmarks/sample.py --checkpoint runs/gpu_digits --seeds 0 --large_images 128
exit $status
