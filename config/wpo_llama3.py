"""WPO (arXiv 2406.11827) on Llama-3-8B-Instruct, scores by a language model.

Leaves out: GPT-4-Turbo's own sixth response, and that the chosen one scores 5 or more (theirs is
another scale). GPT-4-Turbo is retired: any judge at --judge_url. The others:
--model=HuggingFaceH4/mistral-7b-sft-beta --lr=5e-7 --epochs=1 --max_length=1024
--max_prompt_tokens=512; --model=google/gemma-2-9b-it, there with ArmoRM, whose own code we do not
run.
"""
model = "meta-llama/Meta-Llama-3-8B-Instruct"  # paper
prompts = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"  # paper
eval_prompts = "HuggingFaceH4/ultrafeedback_binarized:test_prefs"  # ours, for the local win rate
n_eval = 512                            # ours
iterations = 1                          # paper: one pass
processes = 8                           # ours: one node, a process per GPU

# generate
engine = "vllm"                         # ours
n_responses = 5                         # paper, besides GPT-4-Turbo's
temperature = 0.7                       # paper
top_p = 0.95                            # paper
top_k = 0                               # paper: names none
max_prompt_tokens = 1800                # repository

# rank
ranker = "judge"                        # paper
ranker_model = "gpt-4.1-2025-04-14"     # ours; paper: GPT-4-Turbo
judge_url = "https://api.openai.com/v1"  # ours
judge_mode = "score"                    # paper; the words are ours
judge_votes = 1                         # ours
pair_rule = "best_random"               # paper: a good one against any at least 1 lower
min_gap = 1.0                           # paper; of ours, 0 to 5

# train
loss = "dpo"                            # paper
beta = 0.01                             # paper
wpo = True                              # the paper's weight of a pair
lr = 1e-6                               # repository, cosine with 10 % warm-up
batch_size = 128                        # paper
epochs = 2                              # repository (llama3_instruct.yaml)
max_length = 2048                       # repository
