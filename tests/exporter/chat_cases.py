"""Chat templates that treat messages as well-known families do, and a tokenizer to render them."""

from __future__ import annotations

import random
from typing import Any

# Roles and contents between marks, any role at any place.
CHATML = (
    "{%- for m in messages -%}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
# The same with a system message of its own where there is none.
CHATML_DEFAULT = (
    "{%- if messages[0].role != 'system' -%}"
    "{{ '<|im_start|>system\nBe of use.<|im_end|>\n' }}"
    "{%- endif -%}" + CHATML
)
# The system's message within the user's first; turns in strict alternation; contents stripped.
LLAMA2 = """
{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- set turns = messages[1:] if system is not none else messages %}
{%- for m in turns %}
    {%- if m.role != ('user' if loop.index0 is divisibleby(2) else 'assistant') %}
        {{- raise_exception('Users and assistants take turns, users first.') }}
    {%- endif %}
    {%- set text = m.content %}
    {%- if loop.first and system is not none %}
        {%- set text = '<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' ~ text %}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- bos_token ~ '[INST] ' ~ text | trim ~ ' [/INST]' }}
    {%- else %}
        {{- ' ' ~ text | trim ~ ' ' ~ eos_token }}
    {%- endif %}
{%- endfor %}"""
# Headers; contents stripped.
LLAMA3 = """
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' ~ m['role'] ~ '<|end_header_id|>\n\n' ~ m['content'] | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
# The same with the day in a system message that is always there.
LLAMA3_DATED = """
{{- bos_token ~ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' ~ strftime_now('%d %b %Y') ~ '\n\n' }}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
# No system message; the assistant has another name.
GEMMA = """
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {{- raise_exception('There is no system role.') }}
    {%- endif %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant in turn') }}
    {%- endif %}
    {{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ m.content | trim ~ '<end_of_turn>\n' }}
{%- endfor %}
{{- '<start_of_turn>model\n' if add_generation_prompt }}"""
# The system's message before the first of the user.
GEMMA3 = """
{{- bos_token }}
{%- set lead = '' %}
{%- if messages[0].role == 'system' %}
    {%- set lead = messages[0].content ~ '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant in turn') }}
    {%- endif %}
    {{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ (lead if loop.first) ~ m.content | trim ~ '<end_of_turn>\n' }}
{%- endfor %}
{{- '<start_of_turn>model\n' if add_generation_prompt }}"""
# The system's message before the last of the user.
MISTRAL = """
{%- set system = messages[0].content if messages[0].role == 'system' %}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m.role != ('user' if loop.index0 is even else 'assistant') %}
        {{- raise_exception('after the system: user, assistant, user ...') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' ~ (system ~ '\n\n' if system and loop.last) ~ m.content ~ '[/INST]' }}
    {%- else %}
        {{- ' ' ~ m.content ~ eos_token }}
    {%- endif %}
{%- endfor %}"""
# An empty thought before the last answer; thoughts of earlier ones are dropped.
QWEN3 = """
{%- for m in messages %}
    {%- set text = m.content %}
    {%- if m.role == 'assistant' and '</think>' in text %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if m.role == 'assistant' and loop.last %}
        {%- set text = '<think>\n\n</think>\n\n' ~ text.lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ m.role ~ '\n' ~ text ~ '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""
# Thoughts of answers that the user's last message follows are dropped, later ones stay.
THINKER = """
{%- set seen = namespace(user=messages | length) %}
{%- for m in messages if m.role == 'user' %}
    {%- set seen.user = messages.index(m) %}
{%- endfor %}
{%- for m in messages %}
    {%- set text, thought = m.content, '' %}
    {%- if m.role == 'assistant' and '</think>' in text %}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if m.role == 'assistant' and loop.index0 > seen.user and (thought or loop.last) %}
        {%- set text = '<think>\n' ~ thought ~ '\n</think>\n\n' ~ text.lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ m.role ~ '\n' ~ text ~ '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}"""

SAID = {
    "chatml": CHATML,
    "chatml_default": CHATML_DEFAULT,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "llama3_dated": LLAMA3_DATED,
    "gemma": GEMMA,
    "gemma3": GEMMA3,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "thinker": THINKER,
}


def tokenizer(template: str | None) -> Any:
    """A transformers tokenizer of next to no words, with <s> and </s>."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[]))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def conversation(choose: random.Random) -> list[dict[str, str]]:
    """Up to six messages: in turn, most of them with a system message before, or in any order."""
    words = "a", "<b>", "é", "漢字", "🙂", "{{ x }}", "it's", "</think>", "\n", "\n\n", " ", "\t"
    roles = (
        choose.choices(("system", "user", "assistant"), k=choose.randrange(1, 6))
        if choose.random() < 0.3
        else ["system"] * choose.randrange(2) + ["user", "assistant"] * 3
    )[: choose.randrange(1, 7)]
    return [
        {"role": role, "content": "".join(choose.choices(words, k=choose.randrange(1, 6)))}
        for role in roles
    ]
