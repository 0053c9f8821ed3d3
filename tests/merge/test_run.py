import importlib.metadata
import json
import math
import shutil

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_records import record_again
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuneline.artifacts import DatasetManifest, MergeProof, ModelOrigin, TrainingSummary
from tuneline.errors import ProofError, RecipeError
from tuneline.merge import MergeConfig, weights
from tuneline.merge.pieces import Piece, Pieces
from tuneline.merge.run import run
from tuneline.merge.weights import write_config
from tuneline.models.heldout_rows import read_rows
from tuneline.models.nf4 import load_base
from tuneline.models.sampling import stop_at_end_of_turn
from tuneline.train import TrainConfig
from tuneline.train.run import run as train


def weights_of(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def update_by_hand(adapter, module, scale):
    tensors = load_file(adapter / "adapter_model.safetensors")
    a = tensors[f"base_model.model.{module}.lora_A.weight"]
    b = tensors[f"base_model.model.{module}.lora_B.weight"]
    return scale * (b @ a)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("base", ["original", "dequantized"])
def test_weights_are_base_plus_scaled_product(
    merge, base, use_rslora, tmp_path, tiny_model_dir, adapter_dir, changed_adapter
):
    settings = {"use_rslora": use_rslora, "lora_alpha": 24, "r": 16}
    adapter = changed_adapter(adapter_dir, tmp_path / "adapter", config=settings)
    scale = 24 / math.sqrt(16) if use_rslora else 24 / 16
    proof, merged = merge(adapter=adapter, base=base, dtype="float32")

    before, after = weights_of(tiny_model_dir), weights_of(merged)
    assert set(after) == set(before)
    assert "lm_head.weight" not in after  # tied, and stays so
    loaded = load_base(tiny_model_dir, dtype=torch.float32, device="cpu", quantized=True)
    num_merged = 0
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            assert torch.equal(after[name], weight.float()), name
            continue
        expected = weight.float()
        if base == "dequantized":
            layer = loaded.get_submodule(module)
            expected = bitsandbytes.functional.dequantize_4bit(
                layer.weight.data, layer.weight.quant_state
            )
        expected = expected + update_by_hand(adapter, module, scale)
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6)
        num_merged += 1
    assert num_merged == proof.num_merged_modules == 14
    assert proof.mean_kl < 1e-6 and proof.top1_agreement == 1.0 and proof.num_prompts == 8
    assert MergeProof.read(merged).mean_kl == proof.mean_kl


def test_the_record_tells_all_that_the_model_goes_back_to(merge, tiny_model_dir, adapter_dir):
    _, merged = merge()
    made_from = MergeProof.read(merged).made_from
    assert set(made_from) == {"base_model", "dataset", "adapter"}
    origin, training = ModelOrigin.read(tiny_model_dir), TrainingSummary.read(adapter_dir)
    assert made_from["base_model"].sha256 == origin.sha256 == training.base_sha256
    assert made_from["dataset"].sha256 == "d" * 64
    assert made_from["adapter"].sha256 == training.content_sha256()
    assert made_from["adapter"].settings["seed"] == training.settings["seed"]
    assert made_from["adapter"].environment["torch"] == importlib.metadata.version("torch")


def test_on_the_original_weights_equal_to_pefts_own_merge(merge, tiny_model_dir, adapter_dir):
    _, merged = merge(base="original", dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(adapter_dir)).merge_and_unload().state_dict()
    for name, weight in weights_of(merged).items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-6)


def test_rounded_once_and_named_in_config(merge, tmp_path):
    _, merged = merge(dtype="float32")
    exact = weights_of(merged)
    merged.rename(tmp_path / "exact")
    proof, merged = merge()
    for name, weight in weights_of(merged).items():
        assert torch.equal(weight, exact[name].bfloat16()), name
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    assert proof.num_bytes == (merged / "model.safetensors").stat().st_size
    assert 0 < proof.mean_kl < 0.01


def test_config_has_the_names_of_transformers_4(tiny_model_dir, tmp_path):
    """Version 4 ignores rope_parameters, and would compute without scaling."""
    settings = json.loads((tiny_model_dir / "config.json").read_text())
    scaling = {"rope_type": "linear", "factor": 4.0}
    settings["rope_parameters"] = {**scaling, "rope_theta": 5e5}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    write_config(base_model_dir=tmp_path / "base", dtype="bfloat16", directory=tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["rope_scaling"], written["rope_theta"]) == (scaling, 5e5)
    assert written["rope_parameters"] == settings["rope_parameters"]


def test_shards_in_and_out_hold_the_same(merge, tmp_path, tiny_model_dir):
    sharded = tmp_path / "sharded"
    shutil.copytree(tiny_model_dir, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.save_pretrained(sharded, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    _, merged = merge()
    whole = weights_of(merged)
    merged.rename(tmp_path / "whole")

    proof, merged = merge(base_model_dir=sharded, max_shard_bytes=1 << 20)
    files = sorted(path.name for path in merged.glob("*.safetensors"))
    assert proof.num_shards == len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    found = weights_of(merged)
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    loaded = AutoModelForCausalLM.from_pretrained(merged)
    assert loaded.dtype == torch.bfloat16


def test_tokenizer_template_and_generation_config_come_along(
    merge, tmp_path, tiny_model_dir, adapter_dir, changed_adapter
):
    adapter = changed_adapter(adapter_dir, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("another template")
    _, merged = merge(adapter=adapter)
    assert (merged / "chat_template.jinja").read_text() == "another template"
    settings = json.loads((merged / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (merged / "tokenizer.json").read_bytes() == (
        tiny_model_dir / "tokenizer.json"
    ).read_bytes()
    base = json.loads((tiny_model_dir / "generation_config.json").read_text())
    ours = json.loads((merged / "generation_config.json").read_text())
    assert ours == base | {"do_sample": True, "top_k": 1} | dict.fromkeys(
        ("temperature", "top_p", "repetition_penalty"), 1.0
    )
    assert not {"origin.json", "training.json", "adapter_config.json"} & {
        path.name for path in merged.iterdir()
    }


@pytest.mark.parametrize(
    ("end_of_turn", "named", "stops"),
    [
        ("<|im_end|>\n", {"eos_token_id": 0, "top_p": 0.9}, [0, 2]),
        ("<|im_end|>\n", {"eos_token_id": [0, 2]}, [0, 2]),
        # Without the file, or its key, transformers goes by config.json.
        ("<|im_end|>", None, [0, 2]),
        ("<|im_end|>", {"top_p": 0.9}, [0, 2]),
        # Two tokens: the last one ends the turn.
        ("<|im_start|><|im_end|>\n", {"eos_token_id": 0}, [0, 2]),
        # No token of its own: programs must stop on text, and quantize says so.
        ("</answer>", {"eos_token_id": 0}, 0),
        ("", {"eos_token_id": 0}, 0),
    ],
)
def test_generation_stops_where_the_template_ends_an_answer(
    end_of_turn, named, stops, tmp_path, tiny_model_dir
):
    from transformers import AutoTokenizer, GenerationConfig

    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    path = tmp_path / "generation_config.json"
    if named is not None:
        path.write_text(json.dumps(named))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    stop_at_end_of_turn(tmp_path, end_of_turn, tokenizer)
    found = GenerationConfig.from_pretrained(tmp_path)
    assert found.eos_token_id == stops
    assert found.top_p == (named or {}).get("top_p")


def test_a_merged_chat_model_stops_at_the_end_of_a_turn(
    merge, tmp_path, tiny_model_dir, small_dataset_dir
):
    base, data = tmp_path / "base", tmp_path / "data"
    shutil.copytree(tiny_model_dir, base)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 0}))
    shutil.copytree(small_dataset_dir, data)
    manifest = DatasetManifest.read(data).model_copy(update={"end_of_turn": "<|im_end|>\n"})
    (data / "dataset.json").write_text(manifest.model_dump_json())
    _, merged = merge(base_model_dir=base, dataset_dir=data)
    assert json.loads((merged / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    MergeProof.read(merged).check_files(merged)


def test_of_the_base_nothing_comes_along_that_is_its_own(merge, tmp_path, tiny_model_dir):
    """Other forms of its weights, and what a base has that tuneline made or published itself."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    own = ("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "pytorch_model.bin.index.json")
    own += ("tuneline.json", "merge.json", ".gitattributes", "model.onnx")
    for name in (*own, "LICENSE"):
        (base / name).write_text("{}")
    proof, merged = merge(base_model_dir=base)
    there = {path.name for path in merged.iterdir()}
    assert not (there - {"merge.json"}).intersection(own) and "LICENSE" in there
    assert MergeProof.read(merged).mean_kl == proof.mean_kl


def test_one_file_of_weights_comes_before_an_index(merge, tmp_path, tiny_model_dir):
    """As in transformers: shards that an old index names need not be there."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    proof, merged = merge(base_model_dir=base)
    assert proof.num_shards == 1 and proof.mean_kl < 0.01
    assert set(weights_of(merged)) == set(weights_of(tiny_model_dir))


@pytest.fixture
def spoilt_update(monkeypatch):
    """Return a function that lets the update of a weight be spoilt."""

    def use(change):
        name_of = {}
        pieces_of = Pieces.__call__

        def named(self, name):
            for piece in pieces_of(self, name):
                name_of[id(piece)] = name.removesuffix(".weight")
                yield piece

        def spoilt(self):
            base = self.base.float()
            if self.update is None:
                return self.base
            return base + change(name_of[id(self)], self.update.add_to(base) - base)

        monkeypatch.setattr(Pieces, "__call__", named)
        monkeypatch.setattr(Piece, "merged", spoilt)

    return use


def test_a_broken_merge_is_caught_and_not_kept(merge, spoilt_update, tmp_path):
    broken = "model.layers.1.mlp.down_proj"
    spoilt_update(lambda module, update: update + (0.1 if module == broken else 0.0))
    with pytest.raises(ProofError, match=rf"tensor {broken}.weight is not base plus adapter"):
        merge()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_is_damaged_as_it_is_written(merge, monkeypatch, tmp_path):
    right = weights.write_sharded

    def damaged(directory, *arguments, **named):
        written = right(directory, *arguments, **named)
        with open(directory / "model.safetensors", "r+b") as file:
            file.seek(-1, 2)
            (last,) = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))
        return written

    monkeypatch.setattr(weights, "write_sharded", damaged)
    with pytest.raises(ProofError, match=r"model.safetensors was damaged as it was written"):
        merge()
    assert list((tmp_path / "out").iterdir()) == []


def test_an_adapter_left_out_is_caught(merge, spoilt_update):
    spoilt_update(lambda module, update: 0 * update)
    with pytest.raises(ProofError, match=r"the merged tensor .* is not base plus adapter"):
        merge()


def test_weights_that_are_not_numbers_are_caught(merge, spoilt_update):
    spoilt_update(lambda module, update: update * float("nan"))
    with pytest.raises(ProofError, match=r"of \d+ weights, first nan for"):
        merge()


def test_auto_takes_the_base_with_the_lower_loss(merge, tmp_path, caplog):
    losses = {}
    for base in ("dequantized", "original"):
        proof, merged = merge(base=base, dtype="float32")
        losses[base] = proof.base_losses[base]
        assert proof.merged_loss == pytest.approx(losses[base], rel=1e-4)
        assert proof.merged_answer == proof.trained_answer
        merged.rename(tmp_path / base)
    assert losses["dequantized"] != losses["original"]
    with caplog.at_level("INFO"):
        proof, merged = merge(base="auto", dtype="float32")
    best = min(losses, key=losses.get)
    assert (proof.base, proof.base_asked, proof.base_losses) == (best, "auto", losses)
    assert f"merge.base auto: {best} is taken; held-out loss: dequantized" in caplog.text
    taken = weights_of(tmp_path / best)
    assert all(torch.equal(weight, taken[name]) for name, weight in weights_of(merged).items())


def test_auto_without_4_bits_has_one_base(merge, tmp_path, adapter_dir, caplog, changed_adapter):
    adapter = changed_adapter(adapter_dir, tmp_path / "adapter")
    trained = TrainingSummary.read(adapter)
    trained.model_copy(update={"base_quantization": "none"}).write(adapter)
    with caplog.at_level("INFO"):
        proof, _ = merge(adapter=adapter, base="auto")
    assert proof.base == "original" and list(proof.base_losses) == ["original"]
    assert "there is no other base" in caplog.text


def test_modules_trained_in_full_take_the_bases_place(
    merge, tmp_path, adapter_dir, changed_adapter
):
    ones = torch.full((128,), 1.25)
    name = "base_model.model.model.norm.weight"
    adapter = changed_adapter(
        adapter_dir,
        tmp_path / "adapter",
        tensors={name: ones},
        config={"modules_to_save": ["model.norm"]},
    )
    proof, merged = merge(adapter=adapter, dtype="float32")
    assert torch.equal(weights_of(merged)["model.norm.weight"], ones)
    assert proof.mean_kl < 1e-6


@pytest.mark.parametrize(
    ("load_in_4bit", "dtype"),
    [
        (True, "bfloat16"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((True, "float32"), (False, "float32"), (False, "bfloat16"))
        ),
    ],
)
def test_embeddings_and_head_trained_in_full(
    load_in_4bit, dtype, tmp_path, tiny_model_dir, small_dataset_dir
):
    """Through train itself; its copies are in fp32 beside a base in the compute type."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(base)
    record_again(base)
    train(
        TrainConfig(
            lora={"modules_to_save": ("embed_tokens", "lm_head")},
            load_in_4bit=load_in_4bit,
            learning_rate=2e-2,
            max_steps=3,
            warmup_steps=0,
            global_batch_size=2,
            dtype=dtype,
        ),
        base_model_dir=base,
        dataset_dir=small_dataset_dir,
        adapter_dir=tmp_path / "adapter",
        curves_path=tmp_path / "curves.html",
    )
    proof = run(
        MergeConfig(num_proof_prompts=8, dtype=dtype),
        base_model_dir=base,
        adapter_dir=tmp_path / "adapter",
        dataset_dir=small_dataset_dir,
        merged_dir=tmp_path / "merged",
    )
    assert proof.mean_kl < (1e-6 if dtype == "float32" else 1e-3)
    before, after = weights_of(base), weights_of(tmp_path / "merged")
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        kept = trained[f"base_model.model.{name}"]
        assert torch.equal(after[name], kept.to(getattr(torch, dtype))), name
        assert not torch.equal(after[name].float(), before[name].float()), "it was trained"


def test_a_loftq_adapter_belongs_on_the_dequantized_weights(
    tmp_path, tiny_model_dir, small_dataset_dir, caplog
):
    """What 4 bits lose is in it: on the original weights it would be there twice."""
    train(
        TrainConfig(
            lora={"init_lora_weights": "loftq", "r": 32, "use_rslora": True},
            max_steps=1,
            global_batch_size=2,
            dtype="float32",
        ),
        base_model_dir=tiny_model_dir,
        dataset_dir=small_dataset_dir,
        adapter_dir=tmp_path / "adapter",
        curves_path=tmp_path / "curves.html",
    )

    def merge(base):
        return run(
            MergeConfig(num_proof_prompts=4, dtype="float32", base=base),
            base_model_dir=tiny_model_dir,
            adapter_dir=tmp_path / "adapter",
            dataset_dir=small_dataset_dir,
            merged_dir=tmp_path / base,
        )

    with pytest.raises(RecipeError, match="merge.base is original, .* loftq"):
        merge("original")
    with caplog.at_level("INFO"):
        proof = merge("auto")
    assert proof.base == "dequantized" and proof.mean_kl < 1e-6
    assert "a LoftQ adapter belongs on the dequantized weights alone" in caplog.text
    # Nearer to the original than 4 bits are, for that is what the adapter starts from.
    original, merged = weights_of(tiny_model_dir), weights_of(tmp_path / "auto")
    base = load_base(tiny_model_dir, dtype=torch.float32, device="cpu", quantized=True)
    name = "model.layers.0.mlp.up_proj"
    layer = base.get_submodule(name)
    lossy = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    target = original[f"{name}.weight"].float()
    assert (merged[f"{name}.weight"] - target).norm() < 0.9 * (lossy - target).norm()


def test_how_far_the_tuning_moved_the_model(merge, tiny_model_dir, small_dataset_dir):
    proof, merged = merge(base="original", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = read_rows(small_dataset_dir, 8, lambda text: tokenizer(text).input_ids)
    tuned, base = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for path in (merged, tiny_model_dir)
    )
    total, positions = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row.ids])
            p, q = (model(ids).logits[0].double().log_softmax(-1) for model in (tuned, base))
            total += (p.exp() * (p - q)).sum().item()
            positions += len(row.ids)
    assert proof.tuning_kl == pytest.approx(total / positions, rel=1e-3)
    assert proof.tuning_kl > 0.01
