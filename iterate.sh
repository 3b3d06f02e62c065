#!/usr/bin/env bash
# Algorithm 1 of AIPO: sample, rank, train, and again with the policy that came out.
#
#     bash iterate.sh config/x.py [--preflight] [--key=value ...]
#
# Each arrow is a process of its own (processes > 1: torchrun, on one node), so its memory is back when it ends. A stage whose
# output is there is not run again: interrupt anywhere, run the same command to go on. Settings of the loop: configurator.py.
set -euo pipefail
here=$(dirname "$0")
if [[ -z ${VIRTUAL_ENV:-} && -x $here/.venv/bin/python ]]; then PATH=$(realpath "$here")/.venv/bin:$PATH; fi

export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
if [[ " $* " == *" --preflight "* ]]; then exec python "$here/configurator.py" "$@"; fi     # what the run needs, and no run
settings=$(python "$here/configurator.py" "$@")   # checks them and keeps them as $out/recipe.py
eval "$settings"
launch() { if (($1 > 1)); then torchrun --standalone --nproc-per-node="$1" "${@:2}"; else python "${@:2}"; fi; }
stage() { echo "--- iteration $t: $1"; launch "$2" "$here/$1.py" "$out/recipe.py" "${@:3}"; }   # name, processes, settings
turn() { local all; read -ra all <<< "$1"; echo "${all[(t - 1) % ${#all[@]}]}"; }   # of several, this iteration's
if ((engines == 0)); then engines=$processes; fi
if ((rank_processes == 0)); then rank_processes=$processes; fi

if [[ $prepare ]]; then python "$here/$prepare"; fi
policy=$model
for ((t = 0; t <= iterations; t++)); do
  now=$out/iter_$t
  if ((t > 0)); then
    sampled=$now/candidates.jsonl ranked=$now/pairs.jsonl
    if [[ $candidates ]]; then sampled=$(turn "$candidates")
    elif [[ ! $pairs ]]; then
      from=()
      if ((new_instructions)); then
        stage generate "$engines" --task=instructions --n_prompts="$new_instructions" --iteration="$t" --model="$policy" --out="$now/prompts.jsonl"
        from=(--prompts="$now/prompts.jsonl" --prompt_field= --n_prompts=0)
      fi
      stage generate "$engines" --iteration="$t" --model="$policy" --out="$sampled" ${from[@]+"${from[@]}"}
    fi
    if [[ $pairs ]]; then ranked=$(turn "$pairs")
    else stage rank "$rank_processes" --model="$policy" --candidates="$sampled" --out="$ranked"; fi
    stage train "$processes" --model="$policy" --pairs="$ranked" --out="$now/model"
    policy=$now/model
  fi
  if [[ $eval_prompts ]]; then
    stage generate "$engines" --model="$policy" --prompts="$eval_prompts" --prompt_field="$eval_prompt_field" --n_prompts="$n_eval" --n_responses=1 \
      --temperature="$eval_temperature" --out="$now/answers.jsonl"
    stage eval 1 --answers="$now/answers.jsonl" --baseline="$out/iter_0/answers.jsonl" --out="$now/eval.json"
  fi
done
if [[ $eval_prompts ]]; then python -m nanoaipo.report "$out"; fi    # its last line says where the report is
echo "$out is complete: $iterations iterations, the last policy is $policy"
