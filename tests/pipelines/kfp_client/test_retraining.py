"""A line that runs again: what has not changed comes from the cache, and what has does not."""

from pathlib import Path

from kfp import dsl, local

from tuneline.prepare.component import look_up_data


@dsl.component(base_image="tuneline/light:0", install_kfp_package=False)
def work(source: str, version: str, log: str) -> str:
    """Stand for prepare and all that comes after it."""
    with open(log, "a") as opened:
        opened.write(f"{version}\n")
    return version


@dsl.pipeline
def line(source: str, log: str):
    now = look_up_data(source=source, config="{}").set_caching_options(False)
    work(source=source, version=now.output, log=log)


def test_new_rows_under_an_old_name_are_worked_on(tmp_path: Path) -> None:
    rows, log = tmp_path / "rows.jsonl", tmp_path / "log"
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(tmp_path / "root"),
        enable_caching=True,
        cache_root=str(tmp_path / "cache"),
    )

    def run(text: str) -> list[str]:
        rows.write_text(text)
        line(source=str(rows), log=str(log))
        return log.read_text().splitlines()

    first = run('{"text": "one"}\n')
    assert len(first) == 1
    assert run('{"text": "one"}\n') == first
    changed = run('{"text": "two"}\n')
    assert len(changed) == 2 and changed[1] != first[0]
    # What was there before is known still.
    assert run('{"text": "one"}\n') == changed
