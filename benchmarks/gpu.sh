#!/usr/bin/env bash
# The GPU suite, under nine minutes: equality of every CUDA path, then GPU1-GPU4. See benchmarks/gpu.py.
#   bash benchmarks/gpu.sh            on a GPU; results also under $OUT/benchmarks/results where OUT is set
#   bash benchmarks/gpu.sh --dry      everything tiny on the CPU, under a minute
#   bash benchmarks/gpu.sh --only equality,head
set -u
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root/src:$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
python="${PYTHON:-}"
if [ -z "$python" ]; then
  python=python3
  [ -x "$root/.venv/bin/python" ] && python="$root/.venv/bin/python"
fi
exec "$python" "$root/benchmarks/gpu.py" "$@"
