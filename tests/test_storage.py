"""Files: whole or not there, never through a link."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from bncli.errors import FileError
from bncli.storage import check_writable, write_atomically


def test_a_file_is_written_and_written_over(tmp_path):
    file = tmp_path / "result.json"
    write_atomically(file, "é\n")
    assert file.read_bytes() == "é\n".encode()
    write_atomically(file, b"\x00\xff")
    assert file.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_alone(tmp_path, monkeypatch, step, error):
    file = tmp_path / "result.json"
    file.write_text("old")

    def fail(*_args):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_content_is_on_disk_before_the_name_points_to_it(tmp_path, monkeypatch):
    order = []
    fsync, put = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), put(*names)))
    write_atomically(tmp_path / "result.json", "new")
    assert order[:2] == ["fsync", "replace"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.json").write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to("real.json")
    write_atomically(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def test_the_old_file_s_permissions_are_kept(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("old")
    file.chmod(0o640)
    write_atomically(file, "new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_device_is_written_to_and_not_replaced():
    write_atomically(Path(os.devnull), "gone")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize(("place", "why"), [
    ("x" * 242, "its name is too long; give one of at most 241 bytes"),
    ("missing/result.json", "does not exist"),
    ("x" * 300 + "/result.json", "does not exist"),
    (".", "is a folder; give a file's name"),
])  # fmt: skip
def test_a_path_that_cannot_be_written_is_refused_before_any_work(tmp_path, place, why):
    with pytest.raises(FileError, match=why):
        check_writable(tmp_path / place)
    longest = tmp_path / ("x" * 241)
    check_writable(longest)
    write_atomically(longest, "new")


def test_a_text_with_a_name_that_is_not_utf_8_is_written_with_its_bytes_escaped(tmp_path):
    write_atomically(tmp_path / "report.html", "runs/a\udcff")
    assert (tmp_path / "report.html").read_text() == "runs/a\\udcff"


@pytest.mark.parametrize("place", ["missing/result.json", "file/result.json", "."])
def test_a_path_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as refused:  # noqa: PT011 -- of any kind
        write_atomically(tmp_path / place, "new")
    assert refused.value.filename == str(tmp_path / place)
