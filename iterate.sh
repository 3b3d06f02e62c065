#!/usr/bin/env bash
# Algorithm 1 of AIPO: sample, rank, train, and again with the policy that came out.
#
#     bash iterate.sh config/x.py [--preflight] [--key=value ...]
#     bash iterate.sh --help    the settings of the loop; each script's own --help has the others
#
# Each stage is a process of its own (processes > 1: torchrun), so its memory is free when it ends. A
# stage whose output is there is not run again: interrupt anywhere, run the same command to go on.
# Settings of the loop: nanoaipo/run.py. Several nodes (--nodes=N): docs/cluster.md.
set -euo pipefail
here=$(dirname "$0")
if [[ -z ${VIRTUAL_ENV:-} && -x $here/.venv/bin/python ]]; then
  PATH=$(realpath "$here")/.venv/bin:$PATH
fi
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}

if [[ " $* " == *" --preflight "* || " $* " == *" --help "* ]]; then # print, and do not run
  exec python -m nanoaipo.run "$@"
fi

if [[ " $* " == *" --nodes="* && ! ${ITERATE_NODES:-} ]]; then # come back when all nodes are there
  exec python -m nanoaipo.run --node "$@"
fi

# One run at a time in a folder: descriptor 9 holds its lock until this shell ends, however it ends.
lock=$(python -m nanoaipo.run --lock "$@")
if [[ $lock ]]; then # of several nodes only node 0 has one
  exec 9<> "$lock"
  python -m nanoaipo.locks 9 "$lock" $$
fi
export ITERATE_PID=$$ # a stage that it started ends with it, too

# The settings are checked, kept as $out/recipe.py, and become variables of this shell.
settings=$(python -m nanoaipo.run "$@")
eval "$settings"
if ((engines == 0)); then engines=$processes; fi
if ((rank_processes == 0)); then rank_processes=$processes; fi
if [[ ! -f $eval_guard && -f $here/$eval_guard ]]; then eval_guard=$here/$eval_guard; fi

# stage NAME PROCESSES --key=value ...: run a script with this run's recipe, on all nodes at once;
# nodes=1 stage ...: on this one alone
stage() {
  echo "--- iteration $t: $1"
  local launcher=(python)
  if ((nodes > 1)); then # a week to wait for each other: who dies ends all (nanoaipo/nodes.py)
    launcher=(torchrun --nnodes="$nodes" --node-rank="$this_node" --nproc-per-node="$2"
      --rdzv-endpoint="$rendezvous" --rdzv-conf=timeout=604800)
  elif (($2 > 1)); then
    launcher=(torchrun --standalone --nproc-per-node="$2")
  fi
  "${launcher[@]}" "$here/$1.py" "$out/recipe.py" "${@:3}" 9>&- # the lock stays with this shell
}

# in_turn "FILE ...": print the file that is this iteration's turn
in_turn() {
  local files
  read -ra files <<< "$1"
  echo "${files[(t - 1) % ${#files[@]}]}"
}

# Answer the prompts of the guard with $policy, and grade the answers, which no judge sees.
guard() {
  if [[ ! $eval_guard ]]; then return; fi
  stage generate "$engines" --model="$policy" --prompts="$eval_guard" --prompt_field= \
    --n_prompts=0 --n_responses=1 --temperature=0 --out="$out/iter_$t/guard_answers.jsonl"
  if ((this_node > 0)); then return; fi # all nodes answer, node 0 grades
  nodes=1 stage eval 1 --bench=guard --answers="$out/iter_$t/guard_answers.jsonl" \
    --out="$out/iter_$t/guard.json"
}

# Answer the held-out prompts with $policy, and compare with the answers of iteration 0.
evaluate() {
  if [[ ! $eval_prompts ]]; then return; fi
  guard
  stage generate "$engines" --model="$policy" --prompts="$eval_prompts" \
    --prompt_field="$eval_prompt_field" --n_prompts="$n_eval" --n_responses=1 \
    --temperature="$eval_temperature" --out="$out/iter_$t/answers.jsonl"
  if ((this_node > 0)); then return; fi # all nodes answer, node 0 judges
  nodes=1 stage eval 1 --answers="$out/iter_$t/answers.jsonl" \
    --baseline="$out/iter_0/answers.jsonl" --out="$out/iter_$t/eval.json"
}

if [[ $prepare ]] && ((this_node == 0)); then python "$here/$prepare"; fi
t=0
policy=$model
evaluate

for ((t = 1; t <= iterations; t++)); do
  iteration_dir=$out/iter_$t

  # where the recipe wants new instructions, the policy writes them after the recipe's prompts
  prompts_from=()
  if ((new_instructions)); then
    stage generate "$engines" --task=instructions --n_prompts="$new_instructions" \
      --iteration="$t" --model="$policy" --out="$iteration_dir/prompts.jsonl"
    prompts_from=(--prompts="$iteration_dir/prompts.jsonl" --prompt_field= --n_prompts=0)
    if ((checkable)); then
      if ((this_node == 0)); then
        python -m nanoaipo.add_instructions "$out/recipe.py" --prompt_field= --most="$checkable" \
          --prompts="$iteration_dir/prompts.jsonl" --out="$iteration_dir/instructed.jsonl"
      fi
      prompts_from=(--prompts="$iteration_dir/instructed.jsonl" --prompt_field= --n_prompts=0)
    fi
  fi

  # sample candidates from the policy, unless they or the pairs come from elsewhere
  sampled=$iteration_dir/candidates.jsonl
  if [[ $candidates ]]; then
    sampled=$(in_turn "$candidates")
  elif [[ ! $pairs ]]; then
    stage generate "$engines" --iteration="$t" --model="$policy" --out="$sampled" \
      ${prompts_from[@]+"${prompts_from[@]}"} # so written, bash 3.2 takes an empty array
  fi

  # rank them, and pair the best with the worst
  ranked=$iteration_dir/pairs.jsonl
  if [[ $pairs ]]; then
    ranked=$(in_turn "$pairs")
  else
    stage rank "$rank_processes" --model="$policy" --candidates="$sampled" --out="$ranked"
  fi

  # train; the result is the policy, and the reference, of the next iteration
  stage train "$processes" --model="$policy" --pairs="$ranked" --out="$iteration_dir/model"
  policy=$iteration_dir/model
  evaluate
done

if ((this_node > 0)); then exit; fi

# tables and figures of the evaluations; the last line says where the page is
if [[ $eval_prompts ]]; then python -m nanoaipo.report "$out"; fi
echo "$out is complete: $iterations iterations, the last policy is $policy"
