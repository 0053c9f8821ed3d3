"""The files of an artifact that may be published; all others stay on this machine.

A base model's directory may hold anything beside its weights: notes, .env files, keys. Fetch and
merge carry such files along, so publish lets only known names pass.
"""

from fnmatch import fnmatchcase

from tuneline.artifacts import MODELFILE
from tuneline.models.tokenizer.files import NAMES as TOKENIZER_FILES
from tuneline.models.weight_files import INDEX_FILE

_ALLOWED = (
    *("*.safetensors", "*.gguf", INDEX_FILE, "config.json", "generation_config.json"),
    *("adapter_config.json", "quantize_config.json", "quant_log.csv"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    # Tokenizers: the usual files, and those of sentencepiece, tiktoken and older models.
    *(*TOKENIZER_FILES, "tokenizer*.json", "*.model", "*.model.v[0-9]*", "*.tiktoken", "*.spm"),
    *("vocab.*", "merges.*", "dict.txt", "bpe.codes", "normalizer.json", "added_tokens.json"),
    *("*.jinja", "additional_chat_templates/*.jinja"),
    # For Ollama.
    *(MODELFILE, f"{MODELFILE}-*", "template", "params", "system"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "USE-POLICY*"),
)
_CODE = "*.py"


def may_be_published(relative: str, *, with_code: bool) -> bool:
    """Return whether a file may be published.

    Args:
        relative: path of the file in its artifact.
        with_code: whether the model runs code of its own, so that it needs its Python files.
    """
    if any(part.startswith(".") for part in relative.split("/")):
        return False
    patterns = (*_ALLOWED, _CODE) if with_code else _ALLOWED
    return any(
        fnmatchcase(relative, pattern) and relative.count("/") == pattern.count("/")
        for pattern in patterns
    )
