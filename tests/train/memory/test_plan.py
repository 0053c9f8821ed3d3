"""Runs that do not fit their memory: planned smaller, refused, or continued smaller."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers
from train_setups import cpu_setup

from tuneline.artifacts import DatasetManifest
from tuneline.errors import RecipeError, TrainingError
from tuneline.models.nf4 import load_base
from tuneline.train import TrainConfig, within_memory
from tuneline.train.batch_size import batch_size
from tuneline.train.memory.available import _CONTEXT_BYTES, _container_headroom
from tuneline.train.memory.estimate import GIB, estimate_memory, movable_table_bytes
from tuneline.train.memory.plan import (
    HEAD_ROOM,
    Plan,
    fitting_plan,
    largest_that_fits,
    min_pack_length,
    recipe_plan,
    run_settings,
    smaller_plan,
)
from tuneline.train.memory.shape import model_shape
from tuneline.train.ranks.process import OutOfMemory
from tuneline.train.run import run
from tuneline.train.trainer.state import RunState
from tuneline.train.within_memory import _resumed, _smaller, made_to_fit

SETTINGS = {
    "dtype": "float32",
    "learning_rate": 5e-3,
    "max_steps": 6,
    "eval_steps": 3,
    "global_batch_size": 4,
    "micro_batch_size": 4,
    "gradient_checkpointing": False,
    "packing": False,
}


def train(where, base_dir, dataset, **settings):
    return run(
        TrainConfig.parse({**SETTINGS, **settings}),
        base_model_dir=base_dir,
        dataset_dir=dataset,
        adapter_dir=where / "adapter",
        curves_path=where / "curves.html",
    )


def losses(summary):
    return [point.loss for point in summary.history if point.loss is not None]


@pytest.fixture
def crowd(monkeypatch):
    """Let memory run out in training forwards that `when(number from 0, rows)` names."""

    def install(when):
        seen = []

        def forward(module, args, kwargs, output):
            if module.training:
                seen.append(len(kwargs["input_ids"]))
                if when(len(seen) - 1, seen[-1]):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        def load(*args, **kwargs):
            model = load_base(*args, **kwargs)
            model.register_forward_hook(forward, with_kwargs=True)
            return model

        monkeypatch.setattr("tuneline.models.nf4.load_base", load)
        return seen

    return install


def test_a_run_out_of_memory_goes_on_smaller_and_learns_the_same(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, crowd, caplog
):
    dataset = dataset_dir(answer_rows[:12])
    whole = train(tmp_path / "whole", tiny_model_dir, dataset)
    # Full at the third step; then at the first with two rows; one row is enough.
    crowd(lambda number, rows: (rows == 4 and number == 2) or (rows == 2 and number > 5))
    summary = train(tmp_path / "full", tiny_model_dir, dataset, checkpoint_minutes=0)
    assert losses(summary) == pytest.approx(losses(whole), abs=2e-4)
    assert summary.final_eval_loss == pytest.approx(whole.final_eval_loss, abs=1e-3)
    assert summary.num_out_of_memory == 2
    assert summary.fitted == ("micro_batch_size 1 instead of 4")
    assert "memory ran out (CUDA out of memory. Tried to allocate 2 GiB): continuing" in caplog.text
    assert whole.fitted == "" and whole.num_out_of_memory == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "off"}, r"micro-batches of 4 .*: set train\.fit to auto, lower"),
        ({"micro_batch_size": 1, "gradient_checkpointing": True}, "micro-batches of 1 "),
    ],
)
def test_memory_that_cannot_be_saved_ends_the_step(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, crowd, settings, message
):
    crowd(lambda *_: True)
    with pytest.raises(TrainingError, match=message):
        train(tmp_path, tiny_model_dir, dataset_dir(answer_rows), **settings)
    assert not (tmp_path / "adapter").exists()


@pytest.fixture
def sizes(tiny_model_dir, dataset_dir, answer_rows):
    """What the estimate says of the tiny model, by plan."""
    manifest = DatasetManifest.read(dataset_dir(answer_rows, name="sizes"))
    manifest = manifest.model_copy(
        update={"lengths": manifest.lengths.model_copy(update={"max": 41})}
    )
    config = TrainConfig.parse({**SETTINGS, "packing": True})
    shape = model_shape(tiny_model_dir, config.lora)
    asked = recipe_plan(config, batch_size(config, 1), manifest.max_seq_length)
    settings = run_settings(
        config, manifest, asked, itemsize=4, optimizer=config.optim, device="cuda", fused=False
    )

    def total(**changes):
        return estimate_memory(shape, dataclasses.replace(settings, **changes)).total

    return config, manifest, asked, shape, settings, total


def granted(num_bytes):
    return int(num_bytes / (1 - HEAD_ROOM)) + 2


def write_llama_8b(directory, vocab_size=128256):
    """Write the config.json of Llama-3.1-8B."""
    transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ).save_pretrained(directory)


def test_the_smallest_change_that_fits(sizes, caplog):
    config, _, asked, shape, settings, total = sizes
    assert total() > total(rows=2) > total(rows=1) > total(rows=1, recompute=True)

    def plan(num_bytes, **changes):
        changed = config.model_copy(update=changes)
        available = granted(num_bytes)
        return fitting_plan(changed, asked, shape, settings, available_bytes=available)

    assert plan(total())[0] == asked
    expected = Plan(
        global_batch_size=4,
        micro_batch_size=2,
        gradient_checkpointing=False,
        max_seq_length=64,
    )
    assert plan(total(rows=2))[0] == expected
    assert "using micro_batch_size 2 instead of 4" in caplog.text
    assert plan(total(rows=1))[0].micro_batch_size == 1
    recomputed, estimate = plan(total(rows=1, recompute=True))
    assert recomputed.gradient_checkpointing and recomputed.accumulation_steps(1) == 4
    assert estimate.total == total(rows=1, recompute=True)
    with pytest.raises(
        RecipeError, match="set train.micro_batch_size to 2 .needs .* GiB, same result"
    ):
        plan(total(rows=2), fit="refuse")
    with pytest.raises(RecipeError, match=r"the smallest plan needs 0\.3 GiB"):
        plan(total(rows=1, recompute=True) // 2)
    assert plan(1, fit="off")[0] == asked


def test_auto_is_the_largest_micro_batch_that_fits(sizes):
    _, _, asked, shape, settings, total = sizes
    for available, expected in ((total(), 4), (total(rows=2), 2), (total(rows=1), 1), (1, 1)):
        plan = largest_that_fits(asked, shape, settings, granted(available))
        assert plan == asked.model_copy(update={"micro_batch_size": expected})


def test_kernels_keep_what_is_left(sizes):
    config, _, asked, shape, settings, _ = sizes
    settings = dataclasses.replace(settings, fused=True)
    lean = estimate_memory(shape, settings)
    layer = 64 * 4 * 4 * (2 * 128 + 2 * 64 + 128 + 2 * 256)

    def plan(num_bytes, **changes):
        changed = config.model_copy(update=changes)
        available = granted(num_bytes)
        return fitting_plan(changed, asked, shape, settings, available_bytes=available)

    # Nothing, one layer, both, their norms' outputs too, and no more than that; by what is free,
    # for want of a limit.
    normed = 64 * 4 * 4 * 2 * (128 + 64)
    # Dequantised weights with 64 columns and rows of an adapter: qkv and o, gate and up, down.
    wide = 4 * 192 * (2 * 192 + 2 * 64 + (2 * 256 + 64) + (256 + 64))
    all_activations = 2 * (layer + normed)
    for extra, kept in (
        (0, 0),
        (layer, layer),
        (2 * layer, 2 * layer),
        (2 * layer + normed, 2 * layer + normed),
        (all_activations + wide, all_activations + wide),
        (99 * layer, all_activations + 2 * wide),
    ):
        found, estimate = plan(lean.total + extra)
        assert estimate.total == lean.total + kept
        assert found.kept_gib is None
    found, estimate = plan(lean.total + layer, memory_gib=1.0)
    assert found.kept_gib == pytest.approx(layer / GIB, rel=0.01)
    # When memory runs out in spite of it, they keep nothing; then the batch gets smaller.
    smaller = smaller_plan(found)
    assert smaller == found.model_copy(update={"kept_gib": 0.0})
    assert smaller_plan(smaller).micro_batch_size == 2
    assert "kept_gib 0 instead of all that is free" in smaller.changes_from(plan(lean.total)[0])
    assert found.at_most(smaller).kept_gib == 0 and found.at_most(found) == found


def test_tables_go_to_host_memory_before_packs_get_shorter(sizes, caplog):
    config, _, asked, tied, settings, _ = sizes
    settings = dataclasses.replace(settings, fused=True)
    # A head of its own.
    shape = dataclasses.replace(
        tied, num_tables=2 * tied.num_tables, num_other=tied.num_other + tied.num_tables
    )
    smallest = dataclasses.replace(settings, rows=1, recompute=True)
    on_host = dataclasses.replace(smallest, tables_on_host=True)
    needed = estimate_memory(shape, on_host).total
    assert needed < estimate_memory(shape, smallest).total
    of_tied = estimate_memory(tied, smallest)
    assert estimate_memory(tied, on_host).total == of_tied.total - of_tied.graphs

    def plan(shape=shape, num_bytes=needed, min_length=None, moves_tables=True, **changes):
        return fitting_plan(
            *(config.model_copy(update=changes), asked, shape, settings),
            available_bytes=granted(num_bytes),
            min_length=min_length,
            moves_tables=moves_tables,
        )

    found, estimate = plan()
    assert (found.micro_batch_size, found.gradient_checkpointing) == (1, True)
    assert found.tables_on_host and found.max_seq_length == asked.max_seq_length
    assert estimate.total == needed
    words = "the input embedding and the head in host memory"
    assert f"true instead of false, {words}, which needs" in caplog.text
    # No key of the recipe does it, so the advice names none.
    with pytest.raises(RecipeError) as refused:
        plan(fit="refuse")
    advice = str(refused.value)
    assert "set train.fit to auto, which trains with micro_batch_size 1 instead of 4, " in advice
    assert f", {words} (needs 0.3 GiB, same result)" in advice
    assert "train.micro_batch_size" not in advice and "tables_on_host" not in advice
    assert not plan(fit="off")[0].tables_on_host
    # Packs get shorter only after that, and at once where tables cannot move, or save nothing.
    half = dataclasses.replace(on_host, length=asked.max_seq_length // 2)
    for given, moves, in_host in ((shape, True, True), (shape, False, False), (tied, True, False)):
        needs = estimate_memory(given, dataclasses.replace(half, tables_on_host=in_host)).total
        found, _ = plan(given, needs, min_length=8, moves_tables=moves)
        assert (found.tables_on_host, found.max_seq_length) == (in_host, half.length)
    with pytest.raises(RecipeError, match="the smallest plan needs"):
        plan(moves_tables=False)


def test_a_plan_takes_no_more_memory_than_that_of_its_checkpoint(sizes):
    _, _, asked, *_ = sizes
    moved = asked.model_copy(update={"tables_on_host": True})
    assert asked.at_most(moved).tables_on_host and moved.at_most(asked).tables_on_host
    state = RunState(plan=RunState(plan=moved).model_dump()["plan"])
    config = TrainConfig()
    resumed = _resumed(cpu_setup(config, asked=asked, plan=asked, table_bytes=8), config, state)
    assert resumed.plan == moved and resumed.table_bytes == 8
    assert resumed.changes == "the input embedding and the head in host memory"
    # The machine may have no kernels, or DeepSpeed may send all parameters to the other ranks.
    resumed = _resumed(cpu_setup(config, asked=asked, plan=asked), config, state)
    assert resumed.plan == asked
    state.divides_optimizer = True
    resumed = _resumed(cpu_setup(config, asked=asked, plan=asked, table_bytes=8), config, state)
    assert (resumed.plan, resumed.table_bytes) == (asked, 0)


def test_tables_move_when_memory_has_run_out():
    config = TrainConfig(micro_batch_size=1)
    setup = cpu_setup(config, table_bytes=8)
    smaller = _smaller(setup, config, OutOfMemory("full"))
    assert smaller.plan == setup.plan.model_copy(update={"tables_on_host": True})
    for last in (smaller, cpu_setup(config)):
        with pytest.raises(TrainingError, match=r"memory ran out \(full\)"):
            _smaller(last, config, OutOfMemory("full"))


@pytest.mark.parametrize(
    ("vocab_size", "table_gib", "host_gib", "moves"),
    [
        (128256, 1, 64, True),
        (128256, 1, 3.9, False),
        # torch pins blocks whose size is a power of two, here 2 GiB for 1.2 GiB.
        (152064, 2, 8.1, True),
        (152064, 2, 7.9, False),
    ],
)
def test_tables_take_at_most_half_of_the_host_memory(
    tmp_path, monkeypatch, caplog, vocab_size, table_gib, host_gib, moves
):
    write_llama_8b(tmp_path, vocab_size)
    config = TrainConfig(micro_batch_size=1)
    setup = cpu_setup(config, max_seq_length=2048, device="cuda", dtype=torch.bfloat16, fused=True)
    inputs = SimpleNamespace(
        base_model_dir=tmp_path,
        manifest=DatasetManifest.model_construct(method="sft", max_seq_length=2048),
    )
    # There is no GPU here whose memory could be measured.
    monkeypatch.setattr(within_memory, "available_memory", lambda *_: int(6.5 * GIB))
    monkeypatch.setattr(within_memory, "host_memory", lambda num_ranks: int(host_gib * GIB))
    caplog.set_level("INFO")
    if not moves:
        with pytest.raises(RecipeError, match=r"the smallest plan needs 7\.\d GiB"):
            made_to_fit(setup, config, inputs, is_auto=False)
        words = f"({2 * table_gib}.0 GiB of pinned memory) stay in device memory: they may take"
        assert words in caplog.text
        return
    fitted = made_to_fit(setup, config, inputs, is_auto=False)
    assert fitted.plan.tables_on_host and fitted.table_bytes == 2 * table_gib * GIB
    assert fitted.changes == "the input embedding and the head in host memory"
    sharded = dataclasses.replace(setup, divides_optimizer=True, num_ranks=2)
    with pytest.raises(RecipeError, match="the smallest plan needs"):
        made_to_fit(sharded, config, inputs, is_auto=False)


@pytest.mark.parametrize(
    ("length", "moves_tables", "fits"),
    [(2048, False, False), (2048, True, True), (8192, False, False), (8192, True, True)],
)
def test_an_8b_model_trains_on_a_gpu_with_8_gb(tmp_path, length, moves_tables, fits):
    write_llama_8b(tmp_path)
    config = TrainConfig(micro_batch_size=1)
    shape = model_shape(tmp_path, config.lora)
    manifest = DatasetManifest.model_construct(method="sft", max_seq_length=length)
    asked = recipe_plan(config, batch_size(config, 1), length)
    settings = run_settings(
        *(config, manifest, asked),
        itemsize=2,
        optimizer=config.optim,
        device="cuda",
        fused=True,
    )
    # 7.6 GiB are free, of which CUDA's context takes half a GiB.
    available = int(7.6 * GIB) - _CONTEXT_BYTES

    def plan():
        return fitting_plan(
            *(config, asked, shape, settings), available_bytes=available, moves_tables=moves_tables
        )

    if not fits:
        with pytest.raises(RecipeError, match=r"takes about 7\.\d GiB .* only 6\.7 of 7\.1 GiB"):
            plan()
        return
    found, estimate = plan()
    assert found == asked.model_copy(update={"tables_on_host": True, "kept_gib": None})
    lean = dataclasses.replace(settings, tables_on_host=True)
    assert estimate_memory(shape, lean).total <= available * (1 - HEAD_ROOM)
    # Two tables of 128256 x 4096 numbers of two bytes.
    assert estimate.tables == movable_table_bytes(shape, settings) == 4 * 128256 * 4096


def test_packs_get_shorter_only_where_allowed_and_never_cut_a_row(sizes):
    config, manifest, *_ = sizes
    allowed = config.model_copy(update={"fit_min_length": 16})
    assert min_pack_length(config, manifest) is None
    assert min_pack_length(allowed, manifest) == 41
    raw = manifest.model_copy(update={"method": "cpt"})
    assert min_pack_length(allowed, raw) == 16
    last = Plan(
        global_batch_size=4,
        micro_batch_size=1,
        gradient_checkpointing=True,
        max_seq_length=64,
    )
    assert smaller_plan(last) is None and smaller_plan(last, min_length=41) is None
    shorter = smaller_plan(last, min_length=16)
    assert (shorter.max_seq_length, shorter.global_batch_size) == (32, 8)
    assert shorter.changes_from(last) == (
        "global_batch_size 8 instead of 4, max_seq_length 32 instead of 64"
    )


def test_rows_of_a_step_stay_whole_numbers():
    plan = Plan(
        global_batch_size=12,
        micro_batch_size=6,
        gradient_checkpointing=False,
        max_seq_length=64,
    )
    seen = []
    while plan is not None:
        seen.append((plan.micro_batch_size, plan.accumulation_steps(1)))
        plan = smaller_plan(plan)
    assert seen == [(6, 2), (3, 4), (1, 12), (1, 12)]


def test_too_little_memory_is_refused_before_the_model_is_loaded(
    tmp_path, tiny_model_dir, dataset_dir, answer_rows, monkeypatch
):
    monkeypatch.setattr("tuneline.models.nf4.load_base", None)
    with pytest.raises(RecipeError, match=r"takes about .* memory, but only 0\.0 of 0\.0 GiB"):
        train(tmp_path, tiny_model_dir, dataset_dir(answer_rows), memory_gib=0.001)
    assert not (tmp_path / "adapter").exists()


def test_a_containers_limit_counts(tmp_path):
    assert _container_headroom(tmp_path) is None
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {GIB}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_headroom(tmp_path) is None
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    assert _container_headroom(tmp_path) == 6 * GIB
