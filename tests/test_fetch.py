"""Data sets from the internet: whole or not there, whatever the server, the disk or a kill does."""
from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from file_server import FileServer
from filelock import FileLock
from tiny_archives import WHOLE, contents, is_whole, known, packed_zip, tar

from dealkit.datasets import cache_folder, download
from dealkit.datasets.fetch import fetch


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.01)
    monkeypatch.setattr(download, "TIMEOUT", 5)


# The cache folder

def test_one_variable_says_where_data_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("DEALKIT_DATA", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.setenv("DEALKIT_DATA", "~/there")
    assert cache_folder() == Path.home() / "there"
    for none in (lambda: monkeypatch.setenv("DEALKIT_DATA", ""), lambda: monkeypatch.delenv("DEALKIT_DATA")):
        none()
        assert cache_folder().name == "dealkit" and cache_folder().is_absolute()


# A server that works

@pytest.mark.parametrize("mode", ["gz", "bz2", "xz", ""])
def test_a_data_set_is_fetched_checked_and_unpacked_once(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("DEALKIT_DATA", str(tmp_path))
    data = tar(mode=mode)
    with FileServer({"birds.tgz": data}) as server:
        archive = known(server.url("birds.tgz"), data=data)
        assert fetch("any", [archive]) == tmp_path / "any" and is_whole(tmp_path / "any")
        assert server.asked == [("birds.tgz", None)]
        fetch("any", [archive])
        fetch("any", [archive], download=False)
        assert len(server.asked) == 1


def test_several_archives_and_only_what_is_missing(tmp_path):
    other = packed_zip({"notes/b.txt": b"b"})
    with FileServer({"birds.tgz": WHOLE, "notes.zip": other}) as server:
        archives = [known(server.url("birds.tgz")), known(server.url("notes.zip"), data=other, top="notes")]
        fetch("any", archives, tmp_path)
        assert contents(tmp_path / "notes") == {"b.txt": b"b"}
        shutil.rmtree(tmp_path / "notes")
        fetch("any", archives, tmp_path)
        assert [name for name, _ in server.asked] == ["birds.tgz", "notes.zip", "notes.zip"]


# A download that breaks

def test_a_broken_download_goes_on_where_it_broke(tmp_path):
    with FileServer({"birds.tgz": WHOLE}, breaks=[10_000, 5_000]) as server:
        fetch("any", [known(server.url("birds.tgz"))], tmp_path)
        assert server.asked == [("birds.tgz", None), ("birds.tgz", "bytes=10000-"), ("birds.tgz", "bytes=15000-")]
    assert is_whole(tmp_path)


def test_a_later_call_goes_on_too(tmp_path):
    with FileServer({"birds.tgz": WHOLE}, breaks=[10_000, 0, 0, 0]) as server:
        archive = known(server.url("birds.tgz"))
        with pytest.raises(ConnectionError, match="10,000 bytes are kept.*goes on from there.*By hand: download http"):
            fetch("any", [archive], tmp_path)
        assert len(server.asked) == 1 + download.TRIES and not (tmp_path / "birds").exists()
        fetch("any", [archive], tmp_path)
        assert server.asked[-1] == ("birds.tgz", "bytes=10000-") and is_whole(tmp_path)


def test_a_part_that_is_whole_already_is_taken(tmp_path):
    (tmp_path / "birds.tgz.part").write_bytes(WHOLE)
    with FileServer({"birds.tgz": WHOLE}) as server:
        fetch("any", [known(server.url("birds.tgz"))], tmp_path)
        assert server.asked == [("birds.tgz", f"bytes={len(WHOLE)}-")] and is_whole(tmp_path)


def test_a_part_that_is_too_long_is_dropped(tmp_path):
    (tmp_path / "birds.tgz.part").write_bytes(WHOLE + b"more")
    with FileServer({"birds.tgz": WHOLE}) as server:
        fetch("any", [known(server.url("birds.tgz"))], tmp_path)
        assert server.asked[-1] == ("birds.tgz", None) and is_whole(tmp_path)


def test_a_server_without_range_sends_it_from_the_start(tmp_path):
    with FileServer({"birds.tgz": WHOLE}, breaks=[10_000], ranges=False) as server:
        fetch("any", [known(server.url("birds.tgz"))], tmp_path)
        assert len(server.asked) == 2 and is_whole(tmp_path)


def test_a_server_without_range_that_always_breaks_does_not_keep_us(tmp_path):
    with FileServer({"birds.tgz": WHOLE}, breaks=[10_000] * 50, ranges=False) as server:
        with pytest.raises(ConnectionError, match="could not be downloaded"):
            fetch("any", [known(server.url("birds.tgz"))], tmp_path)
        assert len(server.asked) <= 2 + download.TRIES


def test_an_answer_from_another_place_is_not_put_behind(tmp_path, monkeypatch):
    (tmp_path / "birds.tgz.part").write_bytes(WHOLE[:100])
    first = [7]                                                       # the server says 206, and another first byte
    monkeypatch.setattr(download, "_first_byte", lambda reply: first.pop() if first else pytest.fail("asked again"))
    with FileServer({"birds.tgz": WHOLE}) as server:
        fetch("any", [known(server.url("birds.tgz"))], tmp_path)
        assert [asked for _, asked in server.asked] == ["bytes=100-", None] and is_whole(tmp_path)


def test_the_lock_is_given_back_also_after_a_failure(tmp_path):
    archive = known("http://127.0.0.1:9/birds.tgz")
    with pytest.raises(ConnectionError) as kept:                      # the traceback keeps the frames alive
        fetch("any", [archive], tmp_path)
    lock = FileLock(tmp_path / ".lock")
    lock.acquire(timeout=0)
    lock.release()
    assert kept.value


# A wrong checksum

def test_a_wrong_checksum_is_said_and_nothing_stays(tmp_path):
    with FileServer({"birds.tgz": WHOLE[:-1] + b"?"}) as server:
        with pytest.raises(ValueError, match="checksum is wrong. By hand: download http.*put birds.tgz into"):
            fetch("any", [known(server.url("birds.tgz"))], tmp_path)
        assert len(server.asked) == 1, "from the start already: the same bytes would come again"
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


def test_a_wrong_half_is_fetched_again_from_the_start(tmp_path):
    (tmp_path / "birds.tgz.part").write_bytes(b"an older version of it" * 100)
    with FileServer({"birds.tgz": WHOLE}) as server:
        fetch("any", [known(server.url("birds.tgz"))], tmp_path)
        assert server.asked == [("birds.tgz", "bytes=2200-"), ("birds.tgz", None)] and is_whole(tmp_path)


def test_a_file_that_changes_between_two_halves_is_fetched_again(tmp_path):
    class Changing(dict):
        def __getitem__(self, name):
            return b"older" * 9_000 if len(server.asked) == 1 else WHOLE

    with FileServer({"birds.tgz": b""}, breaks=[1_000]) as server:
        server.files = Changing(server.files)
        fetch("any", [known(server.url("birds.tgz"))], tmp_path)
        assert [asked for _, asked in server.asked] == [None, "bytes=1000-", None] and is_whole(tmp_path)


def test_a_wrong_file_is_fetched_from_the_start_once_and_then_said(tmp_path):
    (tmp_path / "birds.tgz.part").write_bytes(b"x")
    with FileServer({"birds.tgz": WHOLE[:-1] + b"?"}) as server:
        with pytest.raises(ValueError, match="wrong, so it was fetched from the start.*checksum is wrong"):
            fetch("any", [known(server.url("birds.tgz"))], tmp_path)
        assert len(server.asked) == 2 and not (tmp_path / "birds").exists()


# Another address, no address

def test_a_second_address_is_asked_when_the_first_fails(tmp_path):
    with FileServer({"wrong.tgz": b"<html>moved</html>", "birds.tgz": WHOLE}) as server:
        fetch("any", [known(server.url("gone.tgz"), server.url("wrong.tgz"), server.url("birds.tgz"))], tmp_path)
        assert [name for name, _ in server.asked] == ["gone.tgz", "wrong.tgz", "birds.tgz"] and is_whole(tmp_path)


def test_a_refusal_is_said_at_once_and_a_busy_server_is_asked_again(tmp_path):
    with FileServer({"birds.tgz": WHOLE}, status=[503, 503]) as server:
        with pytest.raises(ConnectionError, match="gone.tgz: .*answered 404"):
            server.status.clear()
            fetch("any", [known(server.url("gone.tgz"))], tmp_path)
        assert len(server.asked) == 1
        server.status += [503, 503]
        fetch("any", [known(server.url("birds.tgz"))], tmp_path)
        assert len(server.asked) == 4 and is_whole(tmp_path)


def test_without_a_network_it_says_how_to_do_it_by_hand(tmp_path):
    with pytest.raises(ConnectionError) as caught:
        fetch("any", [known("http://127.0.0.1:9/birds.tgz")], tmp_path)
    said = str(caught.value)
    assert "http://127.0.0.1:9/birds.tgz" in said and f"put birds.tgz into {tmp_path}" in said
    with pytest.raises(FileNotFoundError, match="any is not in .*download is False.*By hand"):
        fetch("any", [known("http://127.0.0.1:9/birds.tgz")], tmp_path, download=False)


def test_by_hand(tmp_path):
    archive = known("http://127.0.0.1:9/birds.tgz")
    (tmp_path / "birds.tgz").write_bytes(WHOLE)
    fetch("any", [archive], tmp_path)
    assert contents(tmp_path / "birds") and (tmp_path / "birds.tgz").exists(), "somebody's own file stays"
    shutil.rmtree(tmp_path / "birds")
    (tmp_path / "birds.tgz").write_bytes(WHOLE[:-9])
    with pytest.raises(ValueError, match=r"birds.tgz has the SHA-256 .* was expected.*Delete it"):
        fetch("any", [archive], tmp_path)
    assert (tmp_path / "birds.tgz").exists() and not (tmp_path / "birds").exists()


# The disk

def test_free_space_is_looked_at_before_anything_is_asked(tmp_path, monkeypatch):
    needed = len(WHOLE) + 50_000
    with FileServer({"birds.tgz": WHOLE}) as server:
        archive = known(server.url("birds.tgz"))
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
        with pytest.raises(OSError, match=r"any needs 0.00 GB .*are free.*DEALKIT_DATA"):
            fetch("any", [archive], tmp_path)
        (tmp_path / "birds.tgz.part").write_bytes(WHOLE[:1])          # one byte less is needed
        assert server.asked == []
        fetch("any", [archive], tmp_path)
    assert is_whole(tmp_path)


def test_a_disk_that_fills_up_is_said(tmp_path, monkeypatch):
    def full(*names, **options):
        raise OSError(28, "No space left on device")

    with FileServer({"birds.tgz": WHOLE}) as server:
        monkeypatch.setattr(tarfile.TarFile, "extract", full)
        with pytest.raises(OSError, match="any cannot be written to .*No space left.*DEALKIT_DATA"):
            fetch("any", [known(server.url("birds.tgz"))], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {".lock", ".incoming"}, "downloaded: need not come again"
