"""The embedded world: the whole loop on two CPU cores in minutes.

Settings as measured for it (ours), not the paper's: alpha * beta = .15 stands for its .005.
"""
prepare = "tiny/prepare.py"             # builds tiny/world on the first run, two to three minutes
model = "tiny/world/base"               # 0.8M parameters
prompts = "tiny/world/prompts.jsonl"    # with checkable answers
eval_prompts = "tiny/world/heldout.jsonl"  # the same kinds of questions, about other things
eval_guard = ""                         # they have answers, so they are the guard
iterations = 6                          # DPO reaches the cap on length here

# generate
engine = "transformers"                 # runs anywhere; --engine=vllm is as good
n_prompts = 512                         # 256 with batches of 16 are faster and noisier
n_responses = 5                         # AIPO's N
temperature = 1.0                       # a small model needs it for five different answers
top_k = 0                               # off
max_new_tokens = 64                     # the cap that DPO grows to
dtype = "float32"                       # CPUs

# rank
ranker_model = "tiny/world/judge"       # a PairRM of 0.3M parameters that likes length a little
drop_unfinished = False                 # answers at the cap of 64 tokens are this world's long ones

# eval
eval_ranker_model = "tiny/world/judge"  # the same judge on purpose; it does not see the truth

# train
loss = "aipo"                           # Eq. 10
beta = 0.5                              # s_ref is 2 to 14 nats here, tens to hundreds in the paper
alpha = 0.3                             # alpha * beta = .15: .1 halves the growth, .2 stops it
lambda_ = 0.2                           # in the paper's range
lr = 4e-4                               # for 0.8M parameters
batch_size = 32                         # at 16 one run collapsed
betas = "0.9,0.99"                      # for 16 steps an iteration
recompute = 0                           # memory is no concern at 0.8M parameters
