"""Likelihoods of answers in batches, against each sequence alone."""

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tuneline.kernels.inference import FusedInference, fused_inference
from tuneline.kernels.ops import cross_entropy
from tuneline.models import likelihood
from tuneline.models.batches import Batches

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# The head's logits are scaled in Granite and capped in Gemma 2.
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=0.1)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, final_logit_softcapping=0.5, sliding_window=6)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
}


def random_model(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


def alone(model, prompt, answer):
    ids = torch.tensor([[*prompt, *answer]])
    with torch.inference_mode():
        table = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    wanted = torch.tensor(answer)
    return (
        table.gather(1, wanted[:, None]).sum().item(),
        bool((table.argmax(-1) == wanted).all()),
    )


def tokens_from(draw):
    return lambda count: tuple(torch.randint(3, 61, (count,), generator=draw).tolist())


@pytest.mark.parametrize("name", MODELS)
def test_batches_equal_sequences_alone(name, monkeypatch):
    model = random_model(name)
    tokens = tokens_from(torch.Generator().manual_seed(1))
    pairs = [
        (prompt, tokens(length)) for prompt in map(tokens, (1, 9, 3, 12, 4)) for length in (1, 5, 2)
    ]
    # What greedy decoding gives is an answer too.
    likeliest = int(model(torch.tensor([pairs[0][0]])).logits[0, -1].argmax())
    pairs.append((pairs[0][0], (likeliest,)))
    pairs.append((tokens(6), tokens(1)))
    # Logits of seven tokens at a time.
    monkeypatch.setattr(likelihood, "_LOGITS_BYTES", 7 * 61 * 4)
    for batches in (Batches(max_items=1), Batches(max_tokens=90), Batches(max_items=9)):
        scores = likelihood.score_answers(model, pairs, batches=batches)
        assert list(scores) and set(scores) == set(pairs)
        for pair in pairs:
            nats, greedy = alone(model, *pair)
            assert scores[pair][0] == pytest.approx(nats, abs=2e-4)
            assert scores[pair][1] == greedy
    assert scores[pairs[15]][1]
    # The model is left as it was.
    assert type(model.base_model).__name__ != "_Given"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_shared_beginning_is_computed_once_unless_layers_have_windows(name, monkeypatch):
    model = random_model(name)
    tokens = tokens_from(torch.Generator().manual_seed(1))
    shared = tokens(20)
    pairs = [((*shared, *tokens(count)), tokens(count)) for count in (1, 5, 2, 3)]
    pairs.append((shared, tokens(2)))
    monkeypatch.setattr(likelihood, "_WORTH_SHARING", 60)
    computed = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scores = likelihood.score_answers(model, pairs, batches=Batches(max_items=9))
    # The last token of the prompt that is nothing but the beginning is computed with the others.
    prompts = [(1, 19), (5, 6)] if name == "llama" else [(5, 25)]
    assert computed == [*prompts, (5, 4)]
    for pair in pairs:
        nats, greedy = alone(model, *pair)
        assert scores[pair] == (pytest.approx(nats, abs=2e-4), greedy)


@pytest.fixture
def packed_rows(monkeypatch):
    """Run layers fused on a CPU, with the ops' references; return the sequences of each call."""
    calls = []

    def listed(fused, sequences, firsts):
        calls.append(sequences)
        return hidden_states(fused, sequences, firsts)

    hidden_states = FusedInference.hidden_states
    monkeypatch.setattr(FusedInference, "hidden_states", listed)
    monkeypatch.setattr(likelihood, "_fused_layers", fused_inference)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_fused_layers_compute_prompts_with_their_answers_in_packed_rows(
    name, packed_rows, monkeypatch
):
    model = random_model(name)
    # Logits of seven tokens at a time, which the op of the kernels reads.
    monkeypatch.setattr(likelihood, "_LOGITS_BYTES", 7 * 61 * 4)
    read = []

    def listed(logits, labels):
        read.append(len(labels))
        return label_log_probs(logits, labels)

    label_log_probs = cross_entropy.label_log_probs
    monkeypatch.setattr(cross_entropy, "label_log_probs", listed)
    tokens = tokens_from(torch.Generator().manual_seed(1))
    pairs = [(tokens(prompt), tokens(answer)) for prompt, answer in ((9, 7), (1, 4), (12, 1))]
    # Answers of one token share their prompt's hidden state.
    pairs += [(pairs[2][0], (token,)) for token in (5, 8, 60)]
    # Another prompt and answer of the same tokens.
    whole = pairs[0][0] + pairs[0][1]
    pairs.append((whole[:11], whole[11:]))
    scores = likelihood.score_answers(model, pairs, batches=Batches(max_items=9))
    # Experts are fused in NF4 alone.
    expected = [] if name == "qwen3_moe" else [[4, 12, 15, 15]]
    assert [sorted(map(len, sequences)) for sequences in packed_rows] == expected
    for pair in pairs:
        nats, greedy = alone(model, *pair)
        assert scores[pair] == (pytest.approx(nats, abs=2e-4), greedy)
    assert not any("_tuneline" in key for module in model.modules() for key in vars(module))
    num_calls = len(packed_rows), len(read)
    assert read == [7, 7, 6]
    stock = likelihood.score_answers(model, pairs, batches=Batches(max_items=9), fuses=False)
    assert (len(packed_rows), len(read)) == num_calls and stock.keys() == scores.keys()


def test_rows_of_any_length_share_a_batch_if_they_are_packed(packed_rows):
    model = random_model("llama")
    tokens = tokens_from(torch.Generator().manual_seed(1))
    pairs = [(tokens(count), tokens(count)) for count in (12, 8, 5, 3, 2)]
    # Two long answers to a prompt are computed with a cache, for which rows are padded.
    prompt = tokens(30)
    pairs += [(prompt, tokens(3)), (prompt, tokens(3))]
    batches = Batches(max_tokens=120, enough_tokens=16)
    scores = likelihood.score_answers(model, pairs, batches=batches)
    assert [sorted(map(len, sequences)) for sequences in packed_rows] == [[3, 5, 9, 15, 23]]
    for pair in pairs:
        nats, greedy = alone(model, *pair)
        assert scores[pair] == (pytest.approx(nats, abs=2e-4), greedy)


def test_long_prompts_are_computed_once_for_several_long_answers(packed_rows):
    model = random_model("llama")
    tokens = tokens_from(torch.Generator().manual_seed(1))
    pairs = [(prompt, tokens(count)) for prompt in (tokens(19), tokens(16)) for count in (3, 5, 4)]
    scores = likelihood.score_answers(model, pairs, batches=Batches(max_items=9))
    assert packed_rows == []
    for pair in pairs:
        nats, greedy = alone(model, *pair)
        assert scores[pair] == (pytest.approx(nats, abs=2e-4), greedy)


class ReadValues(TorchDispatchMode):
    """Counts the values that the host reads from tensors."""

    num_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_reads_scores_only_after_the_last_batch(packed_rows):
    model = random_model("llama")
    tokens = tokens_from(torch.Generator().manual_seed(1))
    pairs = [(tokens(5), tokens(3)) for _ in range(6)]
    reads = ReadValues()

    class Watched(Batches):
        def run(self, *args, **kwargs):
            with reads:
                results = super().run(*args, **kwargs)
                assert reads.num_reads == 0
                assert float(results[0][0].sum()) < 0 and reads.num_reads == 1
            return results

    scores = likelihood.score_answers(model, pairs, batches=Watched(max_items=2))
    assert len(packed_rows) == 3 and reads.num_reads == 1
    for pair in pairs:
        nats, greedy = alone(model, *pair)
        assert scores[pair] == (pytest.approx(nats, abs=2e-4), greedy)
    assert likelihood.score_answers(model, [], batches=Batches()) == {}


def test_scores_of_earlier_batches_outlive_a_lack_of_memory(packed_rows, monkeypatch):
    model = random_model("llama")
    tokens = tokens_from(torch.Generator().manual_seed(1))
    pairs = [(tokens(5), tokens(3)) for _ in range(6)]
    calls = []

    def scarce(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return of_tokens(*args, **kwargs)

    of_tokens = likelihood._of_tokens
    monkeypatch.setattr(likelihood, "_of_tokens", scarce)
    scores = likelihood.score_answers(model, pairs, batches=Batches(max_items=4, max_tokens=32))
    # The second batch of two is divided.
    assert [len(sequences) for sequences in packed_rows] == [4, 2, 1, 1]
    for pair in pairs:
        nats, greedy = alone(model, *pair)
        assert scores[pair] == (pytest.approx(nats, abs=2e-4), greedy)


@pytest.mark.gpu
def test_the_host_waits_for_no_batch_on_a_gpu():
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 256, "head_dim": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to("cuda", torch.bfloat16).eval()
    tokens = tokens_from(torch.Generator().manual_seed(1))
    batch = [(tokens(60 + count), [tokens(40)]) for count in range(4)]
    with likelihood._fused_layers(model) as fused:
        expected = likelihood._score_batch(model, fused, batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = likelihood._score_batch(model, fused, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert fused is not None
    for ours, first in zip(found, expected, strict=True):
        assert torch.equal(ours[0], first[0]) and torch.equal(ours[1], first[1])
