"""Named chat templates, for models that bring none or for data that wants another.

`{{ bos_token }}` goes in front only for tokenizers that put it there themselves: rendered text is
tokenised without adding special tokens.
"""

from typing import Any

from tuneline.errors import DataError

_CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' or message['content'] %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_LLAMA3 = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' or message['content'] %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)

# What stands between an instruction and its input; the template below looks for it.
ALPACA_INPUT = "\n\n### Input:\n"

# The wording of the Stanford Alpaca data set, with and without an input. A system message takes
# the place of the first paragraph.
_ALPACA = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set opening = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% elif '\\n\\n### Input:\\n' in messages[0]['content'] %}"
    "{% set opening = 'Below is an instruction that describes a task, paired with an input that "
    "provides further context. Write a response that appropriately completes the request.' %}"
    "{% set turns = messages %}"
    "{% else %}"
    "{% set opening = 'Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.' %}"
    "{% set turns = messages %}"
    "{% endif %}"
    "{% if opening %}{{ opening + '\\n\\n' }}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}"
    "{{ '### Response:\\n' + message['content'] + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)

_TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "llama3": _LLAMA3}
# Without these as single tokens a model would learn to spell them, and never stop.
_NEEDED_TOKENS = {
    "alpaca": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def use_template(tokenizer: Any, name: str) -> str:
    """Give the tokenizer the template `name`, or keep its own; return the template's text.

    Raises:
        DataError: the tokenizer has no template of its own, or lacks the tokens of the named one.
    """
    if name == "tokenizer":
        if not isinstance(tokenizer.chat_template, str):
            raise DataError(
                "the model's tokenizer has no chat template, so it is a base model rather than a "
                "chat model: set prepare.template to alpaca, chatml or llama3"
            )
        return tokenizer.chat_template
    vocabulary = tokenizer.get_vocab()
    lacking = [token for token in _NEEDED_TOKENS[name] if token not in vocabulary]
    if lacking:
        raise DataError(
            f"template {name} needs the tokens {', '.join(lacking)}, which the model's tokenizer "
            "does not have: use template alpaca, or the tokenizer's own"
        )
    if name == "alpaca" and not tokenizer.eos_token:
        raise DataError("template alpaca ends an answer with eos, and the tokenizer names none")
    template = _TEMPLATES[name]
    if tokenizer.bos_token and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
        template = "{{ bos_token }}" + template
    tokenizer.chat_template = template
    return template
