"""Directories of processes that were killed: the next process removes them, and only them."""

from pathlib import Path

from killed import killed_in

from tuneline.artifacts import new_directory
from tuneline.runtime.scratch import remove_leftovers, scratch_directory


def hidden(directory: Path) -> set[Path]:
    return set(directory.glob(".*"))


def test_the_next_attempt_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_in(new_directory(out), lambda partial: (partial / "half").write_bytes(b"x" * 9))
    (left,) = hidden(tmp_path)
    assert (left / "half").is_file() and not out.exists()
    kept = [
        tmp_path / name for name in (".out.elsewhere.a1b2c3d4", ".outer.x.a1b2c3d4", ".out.mine")
    ]
    for directory in kept:
        directory.mkdir()  # Another machine's, another output's, and a user's.
    with scratch_directory(tmp_path, prefix=".out.") as held, new_directory(out) as partial:
        # A process at work holds its own.
        assert hidden(tmp_path) == {held, partial, *kept}
        assert remove_leftovers(tmp_path, prefix=".") == []
    assert hidden(tmp_path) == set(kept) and out.is_dir()


def test_a_link_in_place_of_a_directory_is_not_followed(tmp_path: Path) -> None:
    killed_in(scratch_directory(tmp_path), lambda _: None)
    (left,) = tmp_path.iterdir()
    left.rmdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    left.symlink_to(tmp_path / "mine")
    with scratch_directory(tmp_path):
        pass
    assert left.is_symlink() and (tmp_path / "mine/file").exists()
