"""The embedded world: the whole loop on two CPU cores in minutes. Settings as measured for it, not the paper's."""
prepare = "tiny/prepare.py"             # builds tiny/world on the first run, two to three minutes
model = "tiny/world/base"
prompts = "tiny/world/prompts.jsonl"
eval_prompts = "tiny/world/heldout.jsonl"
iterations = 6

# generate
engine = "transformers"                 # runs anywhere; --engine=vllm is as good
n_prompts = 512
n_responses = 5
temperature = 1.0                       # a small model needs it for five different answers
top_k = 0
max_new_tokens = 64
dtype = "float32"                       # CPUs

# rank
ranker_model = "tiny/world/judge"
drop_unfinished = False                 # answers at the cap of 64 tokens are this world's long answers

# eval
eval_ranker_model = "tiny/world/judge"

# train
loss = "aipo"
beta = 0.5                              # here margins s_ref are 2 to 14 nats, where the paper's are tens to hundreds, so
alpha = 0.3                             # alpha * beta = .15 stands for the paper's .005: .1 halves the growth, .2 stops it
lambda_ = 0.2
lr = 4e-4
batch_size = 32
betas = "0.9,0.99"
recompute = False                       # memory is no concern at 0.8M parameters
