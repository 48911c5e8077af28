#!/usr/bin/env bash
# The GPU's tests and benchmarks, in under ten minutes: benchmarks/gpu.sh [FOLDER OF WHEELS]
# Needs torch, timm, einops and accelerate; what else is missing comes from the wheels, as from
#   pip download --no-deps --only-binary :all: --dest wheels tyro docstring-parser shtab typeguard datasets dill \
#       multiprocess diffusers xformers nvidia-cuda-runtime-cu12
# of which the last is for xformers, built for CUDA 12, beside a PyTorch for CUDA 13.
# Results go to benchmarks/results/NAME_DEVICE.json as they come.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD
if [ $# -gt 0 ]; then
    python3 -m pip install --quiet --no-index --no-deps "$1"/*.whl || exit 1
fi
site=$(python3 -c "import sysconfig; print(sysconfig.get_path('purelib'))")
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$site/nvidia/cuda_runtime/lib
python3 -c "import torch; assert torch.cuda.is_available(), 'expected a CUDA device, got none'" || exit 1

limit=570
status=0
step() {  # runs one part for so many seconds at most, and goes on with the next whatever comes of it
    local left=$((limit - SECONDS))
    echo "== ${*:2}"
    if [ "$left" -le 0 ]; then
        echo "left out, for time is up"
        status=1
        return
    fi
    # Ctrl-C, on which pytest still tells what failed.
    timeout --signal=INT --kill-after=10 "$(($1 < left ? $1 : left))" "${@:2}" || { status=1; echo "failed: ${*:2}"; }
}
rounds="--rounds 5 --steps_per_round 6"
step 150 python3 -m pytest -v --durations=5 -m gpu tests/test_cuda.py
step 120 python3 benchmarks/train.py --models L/2 $rounds \
    --arms ours "ours, blocks compiled" "ours, model compiled" "ours, checkpointing" DiT U-Net
step 60 python3 benchmarks/train.py --models H/2 $rounds --arms ours "ours, blocks compiled" "ours, checkpointing"
step 40 python3 benchmarks/attention.py --tokens_per_batch 33024 --calls_per_round 20
step 110 python3 benchmarks/train.py --models S/2 $rounds
step 60 python3 benchmarks/sample.py --num_images 0 --large_images 256
step 30 python3 benchmarks/scaling.py --embed_dim 1024 --num_heads 16 --batch 8
exit $status
