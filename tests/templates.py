"""Chat templates in the shapes of models that think; tokens: conftest.build_tokenizer."""

TURN = "'<|' + message.role + '|>' + message.content + '<|end|>\\n'"

# Qwen3 writes a thought, perhaps an empty one, in the last answer; it drops earlier ones
QWEN3 = """
{%- set ns = namespace(last_query=0) %}
{%- for message in messages %}
  {%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
  {%- if message.role != 'assistant' %}
    {{- TURN }}
  {%- else %}
    {%- set content = message.content %}
    {%- set thought = '' %}
    {%- if '</think>' in content %}
      {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|assistant|>' }}
    {%- if loop.last and loop.index0 > ns.last_query %}
      {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|assistant|>' }}
  {%- if enable_thinking is defined and not enable_thinking %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
  {%- endif %}
{%- endif %}
""".replace("TURN", TURN)

# DeepSeek-R1-Distill opens the thought, and writes answers without theirs
R1_DISTILL = """
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|assistant|>' + message.content.split('</think>')[-1].lstrip('\\n') + '<|end|>' }}
  {%- else %}
    {{- '<|' + message.role + '|>' + message.content }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>\\n' }}{%- endif %}
"""

# SmolLM3 writes an empty thought before every answer where it is not to think, and tells the day
SMOLLM3 = """
{{- '<|system|>Today is ' + strftime_now('%d %B %Y') + '<|end|>\\n' }}
{%- set empty = '' %}
{%- if enable_thinking is defined and not enable_thinking %}
  {%- set empty = '<think>\\n\\n</think>\\n' %}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|assistant|>' + empty + message.content.lstrip('\\n') + '<|end|>\\n' }}
  {%- else %}
    {{- TURN }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' + empty }}{%- endif %}
""".replace("TURN", TURN)

# OLMo-3-Think opens the thought, and writes answers as they are
OLMO3_THINK = """
{%- for message in messages %}
  {{- TURN }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>' }}{%- endif %}
""".replace("TURN", TURN)

# DeepSeek-V3.1 closes the thought before every answer, and opens one only to generate
DEEPSEEK_V31 = """
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|assistant|></think>' + message.content.split('</think>', 1)[-1] + '<|end|>' }}
  {%- else %}
    {{- '<|' + message.role + '|>' + message.content }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|assistant|>' + ('<think>' if thinking else '</think>') }}
{%- endif %}
"""

# Gemma 4 writes an empty thought to generate without one, and turns without theirs
GEMMA4 = """
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|assistant|>' + message.content.split('<channel|>')[-1] | trim + '<|end|>\\n' }}
  {%- else %}
    {{- TURN }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|assistant|>' }}
  {%- if not enable_thinking %}{{- '<|channel>thought\\n<channel|>' }}{%- endif %}
{%- endif %}
""".replace("TURN", TURN)

# Nemotron Nano 2 opens the thought in the last answer too, whatever that begins with
NEMOTRON_NANO = """
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|assistant|><think>\\n\\n' + message.content + '<|end|>' }}
  {%- else %}
    {{- TURN }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>\\n\\n' }}{%- endif %}
""".replace("TURN", TURN)

# Kimi K2 Thinking writes an empty thought before every last answer, and does not open one
KIMI_K2 = """
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|assistant|><think></think>' + message.content + '<|end|>' }}
  {%- else %}
    {{- TURN }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
""".replace("TURN", TURN)

# gpt-oss has a thought under a key of its own, and refuses one in the content
GPT_OSS = """
{{- '<|system|>Today is ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {%- if '<|channel|>' in message.content %}{{- raise_exception('channel tags') }}{%- endif %}
    {%- if message.thinking %}
      {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
    {%- endif %}
    {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}
  {%- else %}
    {{- TURN }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}
""".replace("TURN", TURN)

# EXAONE Deep opens a thought with marks of its own
EXAONE_DEEP = R1_DISTILL.replace("think>", "thought>")

# Mistral Small 3 tells the day in a system message that stands in for the user's
MISTRAL_SMALL3 = """
{%- if messages[0].role != 'system' %}
  {{- '<|system|>The date is ' + strftime_now('%Y-%m-%d') + '.' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- message.content + '<|end|>' }}
  {%- else %}
    {{- '<|' + message.role + '|>' + message.content }}
  {%- endif %}
{%- endfor %}
"""

# Llama 3.2 takes the day as a variable, else by the clock
LLAMA32 = """
{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{{- '<|system|>Today Date: ' + date_string + '<|end|>' }}
{%- for message in messages %}
  {{- '<|' + message.role + '|>' + message.content | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""
