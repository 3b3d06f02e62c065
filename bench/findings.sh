#!/usr/bin/env bash
# The paper's findings on the embedded world: objectives tuned with equal budgets, three seeds.
# Writes docs/findings.md and its figures.
#
#     bash bench/findings.sh          two cores, one run on each; interrupted, the same command goes on
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z ${VIRTUAL_ENV:-} && -x .venv/bin/python ]]; then PATH=$PWD/.venv/bin:$PATH; fi
python tiny/prepare.py
OMP_NUM_THREADS=1 python bench/findings.py
