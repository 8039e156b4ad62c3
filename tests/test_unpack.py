"""Archives unpacked: nothing outside of the folder, nothing half, by two processes at once or by one that is killed."""
from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from file_server import FileServer
from tiny_archives import FILES, NOISE, WHOLE, contents, is_whole, known, packed_zip, tar

import dealkit
from dealkit.datasets.fetch import Archive, fetch
from dealkit.datasets.unpack import unpack

# What is in an archive

def entry(name, kind, target="") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize("name, data", [
    ("a.tgz", tar(FILES | {"../evil.txt": b"x"})), ("b.tgz", tar(FILES | {"birds/../../evil.txt": b"x"})),
    ("c.tgz", tar(FILES | {"/evil.txt": b"x"})), ("d.tgz", tar(extra=[entry("birds/l", tarfile.SYMTYPE, "/etc")])),
    ("e.tgz", tar(extra=[entry("birds/l", tarfile.SYMTYPE, "../../..")])),
    ("f.tgz", tar(extra=[entry("birds/l", tarfile.LNKTYPE, "../../evil.txt")])),
    ("g.tgz", tar(extra=[entry("birds/tty", tarfile.CHRTYPE)])),
    ("h.zip", packed_zip(FILES | {"../evil.txt": b"x"})), ("i.zip", packed_zip(FILES | {"/evil.txt": b"x"})),
    ("j.zip", packed_zip(FILES | {"birds\\..\\..\\evil.txt": b"x"})), ("k.zip", packed_zip(link="birds/l")),
    ("l.zip", packed_zip(FILES | {"C:/evil.txt": b"x"})),
    ("m.tgz", tar()[:-2000]), ("n.tgz", b"no archive at all"), ("o.tgz", b""), ("p.zip", packed_zip()[:-30]),
    ("q.tgz", tar({"other/a.jpg": b"x"}))])
def test_nothing_is_written_outside_and_nothing_half(tmp_path, name, data):
    inner = tmp_path / "deep" / "cache"
    inner.mkdir(parents=True)
    (inner / name).write_bytes(data)
    with pytest.raises(ValueError, match=name):
        unpack(inner / name, "birds", inner, progress=False)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [inner / name]
    assert [path.name for path in inner.iterdir()] == [name] and not Path("/evil.txt").exists()


def test_a_folder_that_is_there_is_not_touched(tmp_path):
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds.tgz").write_bytes(WHOLE)
    with pytest.raises(FileExistsError, match="delete or rename"):
        unpack(tmp_path / "birds.tgz", "birds", tmp_path)
    assert list((tmp_path / "birds").iterdir()) == []


# More processes than one

# The packages are only folders here: a process that also imports torch takes ten seconds to be killed.
SCRIPT = """
import sys, types
for name, folder in (("dealkit", sys.argv[5]), ("dealkit.datasets", sys.argv[5] + "/datasets")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from dealkit.datasets.fetch import Archive, fetch
print("ready", flush=True)
fetch("any", [Archive((sys.argv[1],), sys.argv[2], int(sys.argv[3]), 50_000, "birds")], sys.argv[4], progress=False)
"""


def process(archive: Archive, folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, archive.urls[0], archive.sha256, str(archive.size), folder,
                             str(Path(dealkit.__file__).parent)],
                            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_fetch_it_once(tmp_path):
    with FileServer({"birds.tgz": WHOLE}, pause=1.0) as server:
        both = [process(known(server.url("birds.tgz")), tmp_path) for _ in range(2)]
        said = [one.communicate() for one in both]
        assert [one.returncode for one in both] == [0, 0], said
        assert sum("another process is fetching" in out for out, _ in said) == 1
        assert len(server.asked) == 1 and is_whole(tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_a_kill_at_any_moment_leaves_nothing_that_looks_whole(tmp_path):
    many = {f"birds/{i}.jpg": NOISE[:2_000] for i in range(800)}
    data = tar(many, mode="")
    rng, killed, waits = np.random.default_rng(0), 0, (0.05, 0.15, 0.2, 0.3, 0.5, 0.8, 1.2)
    with FileServer({"birds.tgz": data}, pause=0.1) as server:
        archive = known(server.url("birds.tgz"), data=data)
        for wait in waits:
            one = process(archive, tmp_path)
            assert one.stdout.readline() == "ready\n"
            time.sleep(wait * rng.uniform(0.5, 1))
            killed += one.poll() is None
            one.kill()
            one.communicate()
            whole = (tmp_path / "birds").exists()
            assert not whole or len(contents(tmp_path / "birds")) == len(many)
            if whole:
                shutil.rmtree(tmp_path / "birds")
        fetch("any", [archive], tmp_path, progress=False)
    assert killed >= 3 and len(contents(tmp_path / "birds")) == len(many)
    assert {path.name for path in tmp_path.iterdir()} <= {".lock", "birds"}
