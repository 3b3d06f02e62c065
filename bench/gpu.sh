#!/usr/bin/env bash
# Does all of this compute on the GPU what it computes on a CPU, and how fast? At most 8 minutes on
# one H100. Leaves results.md (a table for bench/RESULTS.md), results.jsonl and log.txt in $OUT.
#
#     bash bench/gpu.sh                                    everything
#     bash bench/gpu.sh --only=attention,speed.generate    pages of bench/gpu, or checks
#     bash bench/gpu.sh --dry                              on a CPU, at tiny sizes
#
# COMMIT=... is the commit for the table where the code has come without its git history.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z ${VIRTUAL_ENV:-} && -x .venv/bin/python ]]; then PATH=$PWD/.venv/bin:$PATH; fi
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"
exec python3 -m bench.gpu --out="${OUT:-out/gpu}" "$@"
