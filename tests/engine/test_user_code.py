"""Which files a run loaded that are the user's own."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from pathlib import Path

import pytest

from bncli.engine.user_code import LoadedFiles, digest_of, imported


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package in the current folder, of another name in each test, with a module that another imports."""
    name = f"own_{tmp_path.name}"
    (tmp_path / name / "parts").mkdir(parents=True)
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "models.py").write_text(f"from {name}.parts import block\ndef make(): return block")
    (tmp_path / name / "parts/block.py").write_text("import json, bncli.errors")
    (tmp_path / name / "late.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return name


def sha256(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def test_every_file_of_the_users_own_that_is_imported_is_noted(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    loaded = LoadedFiles()
    imported(f"{package}.models:make")
    importlib.import_module("colorsys")  # of Python's own
    loaded.note()
    expected = [f"{package}/__init__.py", f"{package}/models.py", f"{package}/parts/block.py"]
    assert sorted(loaded.files) == expected  # parts has no __init__.py: there is no file to note
    assert all(digest_of(file) == sha256(file) == digest for file, digest in loaded.files.items())


def test_later_imports_are_added_and_edited_files_keep_their_digest(package: str) -> None:
    loaded = LoadedFiles()
    imported(f"{package}.models:make")
    loaded.note()
    before = dict(loaded.files)
    Path(package, "models.py").write_text("def make(): ...")
    importlib.import_module(f"{package}.late")
    loaded.note()
    assert loaded.files == {**before, f"{package}/late.py": sha256(f"{package}/late.py")}


def test_installed_packages_are_left_out_and_files_elsewhere_have_whole_paths(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("site-packages", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{package}_{folder[:4]}.py").write_text("")
        monkeypatch.setattr(sys, "path", [str(tmp_path / folder), *sys.path])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    loaded = LoadedFiles()
    for folder in ("site", "else"):
        importlib.import_module(f"{package}_{folder}")
    loaded.note()
    assert list(loaded.files) == [str(tmp_path / "elsewhere" / f"{package}_else.py")]


def test_what_is_no_plain_file_has_no_digest(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    for name in ("gone.py", "", "pipe.py", "a\0b"):
        assert digest_of(f"{tmp_path}/{name}") is None


# --- a folder in front ----------------------------------------------------------------------------------------------


def test_a_module_is_imported_from_the_folder_in_front_of_it_with_its_neighbours(package: str, tmp_path: Path) -> None:
    (tmp_path / "deep er").mkdir()
    (tmp_path / "deep er" / f"{package}_net.py").write_text(f"from {package}_part import size\ndef make(): return size")
    (tmp_path / "deep er" / f"{package}_part.py").write_text("size = 3")
    assert imported(f"deep er/{package}_net:make")() == 3
    assert imported(f"./{package}.parts.block:json").__name__ == "json"
    (tmp_path / "deep er" / f"{package}_tree").mkdir()  # a package without an __init__.py
    (tmp_path / "deep er" / f"{package}_tree" / "net.py").write_text("def make(): return 4")
    assert imported(f"deep er/{package}_tree.net:make")() == 4


def test_a_module_of_another_folder_and_the_same_name_is_not_taken_for_it(package: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / f"{package}_late.py").write_text("def make(): return 'other'")
    (tmp_path / f"{package}_late.py").write_text("def make(): return 'here'")
    assert imported(f"{package}_late:make")() == "here"
    with pytest.raises(ImportError, match=f"another module named {package}_late is imported already, from .*; rename"):
        imported(f"other/{package}_late:make")


def test_the_folder_in_front_of_a_module_may_have_a_colon_in_its_name(package: str, tmp_path: Path) -> None:
    (tmp_path / "at 10:30").mkdir()
    (tmp_path / "at 10:30" / f"{package}_beside.py").write_text("def make(): ...")
    assert imported(f"{tmp_path}/at 10:30/{package}_beside:make").__module__ == f"{package}_beside"
