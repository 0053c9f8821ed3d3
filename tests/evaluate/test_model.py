"""lm-eval's requests in batches that fill memory, against lm-eval's own batches."""

import random
from types import SimpleNamespace

import pytest
from lm_eval.models.huggingface import HFLM

from tuneline.errors import ModelError
from tuneline.evaluate.model import load, load_tokenizer


@pytest.fixture(scope="module")
def lm(tiny_model_dir):
    return load(tiny_model_dir, load_tokenizer(tiny_model_dir), batch_size="auto")


def test_likelihoods_are_those_of_lm_eval(lm, caplog):
    draw = random.Random(0)

    def tokens(count):
        return [draw.randrange(3, 200) for _ in range(count)]

    requests = [
        (None, prompt, tokens(length))
        for prompt in map(tokens, (3, 40, 1, 17, lm.max_length + 5))
        for length in (1, 4, 1, 9)
    ]
    # Windows of a long text have one token before them.
    requests += [(None, tokens(1), tokens(lm.max_length - 1))]
    lm.batch_size_per_gpu = 4
    expected = HFLM._loglikelihood_tokens(lm, requests, disable_tqdm=True)
    found = lm._loglikelihood_tokens(requests)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-3) and ours[1] == theirs[1]
    assert "tokens of a prompt are left out" in caplog.text


def test_an_answer_that_the_model_cannot_read_is_an_error(lm):
    # None of its prompt would be left.
    requests = [(None, [5, 6, 7], [8, 9]), (None, [5, 6], [7] * (lm.max_length + 1))]
    number = lm.max_length
    with pytest.raises(ModelError, match=f"an answer has {number + 1} tokens, .* only {number}"):
        lm._loglikelihood_tokens(requests)


def test_generated_texts_are_those_of_lm_eval(lm):
    settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    longer = {**settings, "max_gen_toks": 9}
    prompts = ["How many Mi is 2Gi?", "One", "Say hello to Seoul. " * 4, "Replicas?", "X"]
    requests = [
        SimpleNamespace(args=(prompt, longer if number % 2 else settings))
        for number, prompt in enumerate(prompts)
    ]
    lm.batch_size_per_gpu = 1
    expected = HFLM.generate_until(lm, requests, disable_tqdm=True)
    lm.batches.max_tokens = 60
    assert lm.generate_until(requests) == expected
    assert len(set(expected)) > 1
