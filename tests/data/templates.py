# ruff: noqa: E501
"""Small chat templates that treat turns as those of published families do, and a tokenizer."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<|end|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<s>", "</s>", "[INST]",
    "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<USER>", "<BOT>", "<calls>",
    "</calls>", "<call>", "</call>", "<out>", "</out>", "<eos>",
)  # fmt: skip

# Qwen3: the thinking of turns before the last question is not printed; the last turn always has a
# pair of tags; results of tools are joined in one turn of the user.
QWEN3 = (
    "{%- if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' and not"
    " (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}"
    "{%- if m.role in ('user', 'system') %}<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n"
    "{%- elif m.role == 'assistant' %}{% set thought = '' %}"
    "{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n') %}"
    "{%- set thought = thought.split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- content }}{% endif %}"
    "{%- for call in m.tool_calls or [] %}{{ '\n' if content or not loop.first else '' }}"
    "{%- set call = call.function %}"
    '{{- \'<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}'
    "{{- call.arguments if call.arguments is string else call.arguments | tojson }}"
    "{{- '}\n</tool_call>' }}{% endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{- '<|im_start|>user' }}{% endif %}{{- '\n<tool_response>\n' + content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}"
    "{%- endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Qwen3-Thinking-2507, QwQ: what asks for a turn ends with an open tag.
THINKING = QWEN3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{% endif %}",
    "{{- '<think>\n' }}",
)
# GLM-4.5: a turn ends where the next role's marker begins.
GLM = (
    "{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{{- '<|user|>\n' + m.content }}"
    "{%- elif m.role == 'tool' %}{{- '<|observation|>\n' + m.content }}"
    "{%- elif m.role == 'assistant' %}{{- '<|assistant|>' }}"
    "{%- set thought = m.reasoning_content or '' %}{% set content = m.content or '' %}"
    "{%- if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')"
    "[-1] %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{- '\n<think>' + (thought.strip() if loop.index0 > ns.last else '') + '</think>' }}"
    "{%- if content.strip() %}{{ '\n' + content.strip() }}{% endif %}"
    "{%- for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name }}"
    "{%- for k, v in c.function.arguments.items() %}{{ '\n<arg>' + k + '=' }}"
    "{{- v if v is string else v | tojson }}{{ '</arg>' }}{% endfor %}{{- '\n</tool_call>' }}"
    "{%- endfor %}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# DeepSeek-R1: several tokens close a turn that calls tools, whose arguments are printed as text.
DEEPSEEK = (
    "{%- for m in messages %}{% if m.role == 'user' %}{{- '<USER>' + m.content }}"
    "{%- elif m.role == 'tool' %}{{- '<out>' + m.content + '</out>' }}"
    "{%- elif m.role == 'assistant' and m.tool_calls %}{{- '<BOT><calls>' }}"
    "{%- for c in m.tool_calls %}{{- '<call>' + c.type + ' ' + c.function.name + '\n```json\n' + "
    "c.function.arguments + '\n```</call>' }}{% endfor %}{{- '</calls><eos>' }}"
    "{%- elif m.role == 'assistant' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<BOT>' }}{% endif %}"
    "{{- m.content.split('</think>')[-1] + '<eos>' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt and messages[-1].role != 'tool' %}"
    "{{- '<BOT><think>\n' }}{% endif %}"
)
# gpt-oss: the last turn ends with another token than the others, and thinking is a channel.
CHANNELS = (
    "{%- for m in messages %}{% if m.role != 'assistant' %}"
    "{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% else %}"
    "{%- if m.thinking and loop.last %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + "
    "m.thinking + '<|end|>' }}{% endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}"
    "{%- endfor %}{% if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"
)
# Mistral: nothing asks for a turn but the end of the question, and the roles must alternate.
MISTRAL = (
    "{{- '<s>' }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.index0 % 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{- '[INST]' + m.content + '[/INST]' }}{% else %}{{- m.content + '</s>' }}{% endif %}"
    "{% endfor %}"
)
# Llama 3, Gemma: the text of a turn is trimmed.
TRIMMING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n\n' + (m.content | trim) + "
    "'<|im_end|>' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{% endif %}"
)


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Every byte is one token, every special string another."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    made.add_special_tokens({"additional_special_tokens": [s for s in SPECIAL if s != "<eos>"]})
    made.chat_template = template
    return made
