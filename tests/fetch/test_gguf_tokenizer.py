"""The tokenizer that is read from a GGUF file's header alone is the one that fetch writes."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy
import pytest
from transformers import AutoTokenizer

from tuneline.errors import ModelError
from tuneline.fetch import builtin
from tuneline.fetch.gguf.tokenizer import complete, read_tokenizer, save_tokenizer
from tuneline.prepare.tokens.tokenizer import load_tokenizer

TEXTS = (
    "Is 1024Mi more than 1.5Gi?\n\tNo: it's less.",
    "\uc548\ub155\ud558\uc138\uc694 caf\u00e9 \U0001f600  two  spaces ",
    "<|im_start|>user\nHi<|im_end|>\n<s>a</s>",
    " ab aab<tool> b",
)
PIECES = ["<unk>", "<s>", "</s>", "<tool>", "\u2581", "a", "b", "ab", "\u2581ab", "\u2581a"]


def write_gguf(path: Path, *, model: str, pre: str | None, adds_bos: bool | None) -> Path:
    """Write a file with the header of a small llama, a vocabulary and no useful weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(96)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_feed_forward_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if adds_bos is not None:
        writer.add_add_bos_token(adds_bos)
    if model in ("llama", "gemma4"):
        writer.add_token_list(PIECES)
        writer.add_token_scores([-float(index) for index in range(len(PIECES))])
        writer.add_token_types([2, 3, 3, 4, *(1 for _ in PIECES[4:])])
        writer.add_unk_token_id(0)
    else:
        letters = [chr(code) for code in range(33, 127)]
        writer.add_token_list(["<s>", "<s>x", "</s>", *letters, "ab", "\u0120", "\u0120ab"])
        writer.add_token_types([3, 3, 3, *(1 for _ in letters), 1, 1, 1])
        writer.add_token_merges(["a b", "\u0120 ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.add_tensor("x", numpy.zeros((2, 3), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_built_in_model_s_is_the_one_that_fetch_writes(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    read, context = read_tokenizer(builtin.locate("smollm2-135m"))
    written, longest = load_tokenizer(str(smollm2_dir))
    assert context == longest == 8192
    assert read.get_vocab() == written.get_vocab()
    assert read.special_tokens_map == written.special_tokens_map
    assert read.chat_template == written.chat_template
    for text in TEXTS:
        assert read.encode(text) == written.encode(text)
    assert context is not None
    save_tokenizer(read, context, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (smollm2_dir / name).read_bytes()


@pytest.mark.parametrize(
    ("model", "pre", "adds_bos"),
    [
        ("llama", None, None),
        ("llama", None, False),
        ("gemma4", None, True),
        ("gpt2", "llama-bpe", True),
        ("gpt2", "qwen2", None),
        ("gpt2", "smollm", None),
    ],
)
def test_transformers_reads_the_same(
    model: str, pre: str | None, adds_bos: bool | None, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", model=model, pre=pre, adds_bos=adds_bos)
    read, context = read_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    complete(theirs, {} if pre is None else {"tokenizer.ggml.pre": pre})
    assert context == 96
    assert read.get_vocab() == theirs.get_vocab()
    assert read.special_tokens_map == theirs.special_tokens_map
    assert read.chat_template == theirs.chat_template == "{{ messages[0].content }}"
    for text in TEXTS:
        assert read.encode(text) == theirs.encode(text)
        assert read.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
    adds = read.encode("ab") != read.encode("ab", add_special_tokens=False)
    assert adds == {"llama": adds_bos is not False, "gemma4": False}.get(model, bool(adds_bos))


def test_a_tokenizer_that_transformers_does_not_know(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model="rwkv", pre=None, adds_bos=None)
    with pytest.raises(ModelError, match=r"m\.gguf cannot be read .*'rwkv'.* safetensors model"):
        read_tokenizer(path)


def test_init_does_not_import_torch(tmp_path: Path) -> None:
    rows = "".join(f"How much is {n} + 1?,It is {n + 1}.\n" for n in range(60))
    (tmp_path / "a.csv").write_text("question,answer\n" + rows)
    code = (
        "import sys\n"
        "from tuneline.pipelines.cli.main import app\n"
        "app(['init', 'a.csv', '--base', 'builtin:smollm2-135m'], standalone_mode=False)\n"
        "print('loaded', sorted(m for m in ('torch', 'gguf', 'kfp') if sys.modules.get(m)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "its template" in done.stdout  # The lengths are the tokenizer's, not estimates.
    assert done.stdout.endswith("loaded []\n")
