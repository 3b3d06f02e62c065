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
