"""A real model made better by one command: SmolLM2-135M-Instruct learns to do as it is told.

Settings as tried for it on two CPU cores (docs/real.md), not the paper's. Nobody judges: code
checks whether a response follows the instruction of its prompt, and is an answer.
"""
prepare = "real/prepare.py"             # makes real/world on the first run
model = "real/world/model"              # SmolLM2-135M-Instruct
prompts = "real/world/prompts.jsonl"    # requests with checkable instructions
unasked = "sentences,paragraphs,ends_with,lowercase,uppercase,quoted,json"  # it never does
untold = True                           # a response has to be an answer, too
eval_prompts = "real/world/heldout.jsonl"  # other requests, and plain questions as the guard
eval_guard = ""                         # they have answers, so they are the guard
eval_ranker = "answer"                  # a win follows more than the first policy
eval_temperature = 0.0                  # greedy: nothing but the policy differs
iterations = 3                          # half an hour on two cores

# generate
engine = "vllm"                         # its CPU build (make vllm)
n_prompts = 160                         # others at each iteration
n_responses = 8                         # of eight, some follow and some do not
temperature = 0.9                       # the paper's .4 gives eight answers of one kind
top_k = 0                               # off
max_new_tokens = 192                    # of some 80; at 128 too many that ask for more are cut

# rank
ranker = "answer"                       # right is what follows all of its instructions
pair_rule = "right_wrong"               # followed against not followed
max_pairs = 3                           # of a prompt

# train
loss = "aipo"                           # Eq. 10
beta = 0.1                              # paper
alpha = 0.05                            # in the paper's range; * beta * an s_ref of 40: .2
lambda_ = 0.2                           # in the paper's range
lr = 5e-5                               # for 135M parameters and some 35 steps an iteration
batch_size = 8                          # pairs
max_length = 512                        # prompt and response
tokens_per_microbatch = 2048            # two cores
recompute = 0                           # memory is no concern at 135M parameters
