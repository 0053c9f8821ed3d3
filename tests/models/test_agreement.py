"""What is found if files of a model say something else than the records, with fitting hashes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from small_records import adapter_weights, new_export, new_merge, new_origin, new_training

from tuneline.artifacts import DatasetManifest, TrainingSummary
from tuneline.merge import MergeConfig
from tuneline.train import TrainConfig
from tuneline.verify import verify

TEMPLATE = "{% for m in messages %}\n{{ m.content }}{% endfor %}"
CONFIG = {"r": 16, "lora_alpha": 16, "use_rslora": False}


@pytest.fixture
def write_run(tmp_path: Path, new_dataset: Callable[..., DatasetManifest]) -> Callable[..., Path]:
    """Write a run whose records and hashes fit, whatever its files say."""

    def write(
        config: dict = CONFIG,
        num_modules: int = 7,
        weights: bytes | None = None,
        **templates: str,
    ) -> Path:
        for name in ("dataset", "adapter", "merged", "gptq"):
            (tmp_path / name).mkdir()
            if name != "dataset":
                (tmp_path / name / "tokenizer_config.json").write_text("{}")
            text = templates.get(name, TEMPLATE)
            (tmp_path / name / "chat_template.jinja").write_bytes(text.encode())
        origin, dataset = new_origin(revision="a" * 40), new_dataset(sha256="2" * 64)
        dataset.write(tmp_path / "dataset")
        dataset = DatasetManifest.read(tmp_path / "dataset")
        adapter = tmp_path / "adapter"
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        (adapter / "adapter_model.safetensors").write_bytes(weights or adapter_weights(num_modules))
        new_training().write(adapter, TrainConfig(), parents=[origin, dataset])
        training = TrainingSummary.read(adapter)
        merge = new_merge(num_merged_modules=7)
        merge.write(tmp_path / "merged", MergeConfig(), parents=[origin, dataset, training])
        merge = type(merge).read(tmp_path / "merged")
        new_export(format="gptq-4bit", kind="gptq", file=".").write(
            tmp_path / "gptq", parents=[merge]
        )
        return tmp_path

    return write


def found(root: Path) -> dict[str, list[str]]:
    return {item.path.name: item.differences for item in verify(root) if item.differences}


def test_a_run_that_agrees_has_no_differences(write_run: Callable[..., Path]) -> None:
    assert found(write_run()) == {}


def test_line_ends_of_a_template_do_not_matter(write_run: Callable[..., Path]) -> None:
    assert found(write_run(dataset=TEMPLATE.replace("\n", "\r\n"))) == {}


@pytest.mark.parametrize(("name", "value"), [("r", 64), ("lora_alpha", 32), ("use_rslora", True)])
def test_another_scale_of_the_adapter(
    write_run: Callable[..., Path], name: str, value: object
) -> None:
    (sentence,) = found(write_run(config={**CONFIG, name: value}))["adapter"]
    assert sentence.startswith(f"adapter_config.json has {name} {value}, but training.json says")


def test_another_number_of_modules(write_run: Callable[..., Path]) -> None:
    assert found(write_run(num_modules=6)) == {
        "merged": ["merge.json says that 7 modules were merged, but the adapter has 6"]
    }


@pytest.mark.parametrize("name", ["adapter", "merged", "gptq"])
def test_another_chat_template(write_run: Callable[..., Path], name: str) -> None:
    differences = found(write_run(**{name: "{{ other }}"}))
    assert list(differences) == [name]
    assert differences[name][0].startswith("the chat template of the tokenizer is not that of the")


@pytest.mark.parametrize("weights", [b"weights", b"\xff" * 8, (5).to_bytes(8, "little") + b"[1,2"])
def test_a_file_without_a_header(write_run: Callable[..., Path], weights: bytes) -> None:
    (sentence,) = found(write_run(weights=weights))["merged"]
    assert sentence.startswith("cannot be compared with its record: ")
