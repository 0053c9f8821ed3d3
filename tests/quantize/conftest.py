import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tuneline.artifacts import HELDOUT_FILE, INPUT_IDS, TRAIN_FILE, MergeProof, write_jsonl
from tuneline.quantize.proof import probes

PROMPT = "<|im_start|>user\nHow many Mi are 3Gi?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="session")
def other_dir(merged_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another merged model, as near as another epoch's: bounds of a proof would let it pass."""
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("quantize") / "other"
    shutil.copytree(merged_dir, path)
    weights = load_file(path / "model.safetensors")
    weights = {name: tensor * (1 + 1e-6) for name, tensor in weights.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    MergeProof.read(path).write(path)
    return path


@pytest.fixture(scope="session")
def uneven_dir(merged_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model in which each row of a weight has another size, and answers are distinct.

    In a plain random model the scales of all rows are nearly the same, and its logits too, so a
    proof could not see that scales were exchanged.
    """
    import torch
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("quantize") / "uneven"
    shutil.copytree(merged_dir, path)
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            sizes = 10 ** (torch.rand(len(weight), 1, generator=generator) - 0.5)
            weights[name] = 2 * sizes * weight
        elif "embed" in name:
            weights[name] = 8 * weight
    # As most models are, in bfloat16.
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}, indent=2))
    MergeProof.read(path).write(path)
    return path


@pytest.fixture(scope="session")
def dataset_dir(merged_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training rows to calibrate on, and one held-out prompt."""
    import pyarrow
    import pyarrow.parquet
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("dataset")
    tokenizer = AutoTokenizer.from_pretrained(merged_dir)
    rows = tokenizer([f"{number}Gi is {1024 * number}Mi of memory." for number in range(1, 17)])
    column = pyarrow.array(rows["input_ids"], pyarrow.list_(pyarrow.int32()))
    pyarrow.parquet.write_table(pyarrow.table({INPUT_IDS: column}), path / TRAIN_FILE)
    row = {"prompt": PROMPT, "answer": "3072Mi", "end": "<|im_end|>", "question": "3Gi in Mi?"}
    write_jsonl(path / HELDOUT_FILE, [row])
    return path


@pytest.fixture(scope="session")
def train_pieces() -> Callable[..., Any]:
    """Write tokenizer.model, a sentencepiece vocabulary of 1,000; return its processor."""
    import sentencepiece

    def train(path: Path, **special: Any) -> Any:
        text = path.parent / "text.txt"
        text.write_text("\n".join(text for text in probes.texts() if text.strip()) * 3)
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(path / "tokenizer"),
            vocab_size=1000,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            hard_vocab_limit=False,
            minloglevel=2,
            **special,
        )
        (path / "tokenizer.vocab").unlink()
        return sentencepiece.SentencePieceProcessor(str(path / "tokenizer.model"))

    return train


@pytest.fixture(scope="session")
def layouts(train_pieces: Callable[..., Any]) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Vocabularies of sentencepiece, laid out as those of published models.

    Each function writes the tokenizer's files to a directory, and returns settings of config.json
    and, as `stops`, the tokens at which the model stops.
    """
    return {
        layout.__name__: partial(layout, train_pieces=train_pieces)
        for layout in (phi3, gemma2, mistral)
    }


PHI_TOKENS = (
    *("<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>"),
    *("<|placeholder3|>", "<|placeholder4|>", "<|system|>", "<|end|>", "<|placeholder5|>"),
    *("<|placeholder6|>", "<|user|>"),
)
PHI_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + "
    "'<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{{ '<start_of_turn>' + "
    "('model' if message['role'] == 'assistant' else message['role']) + '\n' + "
    "message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ raise_exception('only user and assistant') }}"
    "{% endif %}{% endfor %}"
)


def save_fast(path: Path, pieces, *, prefix_space: bool, added) -> None:
    """Write tokenizer.json, the same vocabulary for the library of that name."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from transformers.tokenization_utils_base import generate_merges

    vocab = {pieces.id_to_piece(index): index for index in range(pieces.vocab_size())}
    normal = {
        piece: index
        for piece, index in vocab.items()
        if not (pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_byte(index))
    }
    merges = generate_merges(normal)
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    if not prefix_space:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    after = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    tokenizer.save(str(path / "tokenizer.json"))


def as_settings(token) -> dict:
    kept = ("content", "special", "lstrip", "rstrip", "single_word", "normalized")
    return {name: getattr(token, name) for name in kept}


def phi3(path: Path, train_pieces) -> dict:
    """Special tokens behind the vocabulary, which take the white space after them along."""
    from tokenizers import AddedToken

    pieces = train_pieces(path)
    size = pieces.vocab_size()
    plain = [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>")]
    end = AddedToken("</s>", special=False, normalized=False, rstrip=True)
    others = [
        AddedToken(name, special=True, normalized=False, rstrip=name != "<|endoftext|>")
        for name in PHI_TOKENS
    ]
    save_fast(path, pieces, prefix_space=True, added=[*plain, end, *others])
    ids = [0, 1, 2, *range(size, size + len(PHI_TOKENS))]
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "legacy": False,
        "chat_template": PHI_TEMPLATE,
        "added_tokens_decoder": {
            str(index): as_settings(token)
            for index, token in zip(ids, [*plain, end, *others], strict=True)
        },
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = {"bos_token_id": 1, "eos_token_id": size, "pad_token_id": size}
    stops = [size, size + 1, size + 7]
    return {"vocab_size": size + 32, **ends, "stops": stops, "sliding_window": 2047}


def gemma2(path: Path, train_pieces) -> dict:
    """Special tokens inside the vocabulary, no space before a text, a token that begins it."""
    from tokenizers import AddedToken

    turns = ["<mask>", "<start_of_turn>", "<end_of_turn>"]
    special = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>"}
    special |= {"bos_piece": "<bos>", "eos_piece": "<eos>", "user_defined_symbols": turns}
    pieces = train_pieces(path, **special, add_dummy_prefix=False)
    added = [
        AddedToken(name, special=True, normalized=False)
        for name in ("<pad>", "<eos>", "<bos>", "<unk>", *turns)
    ]
    save_fast(path, pieces, prefix_space=False, added=added)
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "chat_template": GEMMA_TEMPLATE,
        "added_tokens_decoder": {
            str(pieces.piece_to_id(token.content)): as_settings(token) for token in added
        },
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    stops = [1, pieces.piece_to_id("<end_of_turn>")]
    own = {"query_pre_attn_scalar": 32, "sliding_window": 64}
    return {"vocab_size": pieces.vocab_size(), **ends, "stops": stops, **own}


def mistral(path: Path, train_pieces) -> dict:
    """The plainest: three special tokens, turns marked by ordinary text."""
    from tokenizers import AddedToken

    pieces = train_pieces(path)
    names = ("<unk>", "<s>", "</s>")
    added = [AddedToken(name, special=True, normalized=False) for name in names]
    save_fast(path, pieces, prefix_space=True, added=added)
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "chat_template": MISTRAL_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return {"vocab_size": pieces.vocab_size(), "bos_token_id": 1, "eos_token_id": 2, "stops": [2]}
