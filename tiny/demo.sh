#!/usr/bin/env bash
# What `make demo` runs: the loop with AIPO and with DPO from the same base, one core each, then
# the table and the figures. A stage takes a second or two here and its imports four, so each loop
# has a python that has imported everything before (bench/warm.py).
set -euo pipefail
python tiny/prepare.py
mkdir -p out
export OMP_NUM_THREADS=1

python bench/warm.py bash iterate.sh config/tiny.py --loss=dpo --out=out/tiny_dpo \
  > out/tiny_dpo.log 2>&1 &
dpo=$!
trap 'kill $dpo 2> /dev/null || true' EXIT # an interrupted demo leaves nothing running
python bench/warm.py bash iterate.sh config/tiny.py --out=out/tiny_aipo

echo "--- waiting for DPO, whose answers are longer (out/tiny_dpo.log)"
if ! wait $dpo; then
  tail -n 5 out/tiny_dpo.log
  exit 1
fi
trap - EXIT
python -m nanoaipo.report out/tiny_aipo out/tiny_dpo
