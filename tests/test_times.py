"""The fastest way is found once and kept in a file, and no state of that file is an error."""

import json

import pytest
import torch

from bonsai_image.ops import backends
from bonsai_image.ops.backends import Choice, Setting, cpu_backend, selfcheck, torch_backend
from bonsai_image.ops.packed import unwrap
from bonsai_image.tests.support.reference import random_weight

CPU = torch.device("cpu")
TERNARY = unwrap(random_weight(2, "symmetric", 192, 256, 128))
KIND = selfcheck.kind(TERNARY, torch.float32)

pytestmark = pytest.mark.usefixtures("fresh_backends")


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "times.json"
    monkeypatch.setenv(selfcheck.FILE, str(path))
    return path


@pytest.fixture
def measured(monkeypatch):
    """A clock by which the second of two ways is the faster one, and the sizes that it timed."""
    seen = []

    def milliseconds(calls, _device):
        seen.append(len(calls))
        return dict(zip(calls, (2.0, 1.0), strict=True))

    monkeypatch.setattr(selfcheck, "milliseconds", milliseconds)
    return seen


WAYS = Choice(torch_backend, 0), Choice(cpu_backend, 2)


def fastest(rows=512):
    """Asked by a new process."""
    selfcheck._times.cache_clear()
    return selfcheck.fastest(WAYS, CPU, rows, KIND).backend.NAME


def test_it_is_measured_once_and_kept(file, measured):
    assert fastest() == fastest(5) == "cpu" and measured == [2, 2]
    kept = json.loads(file.read_bytes())
    (times,) = next(iter(kept.values())).values()
    times[1]["cpu with two int8 digits"] = 3.0  # whoever reads the file is believed
    file.write_text(json.dumps(kept))
    assert fastest() == "torch" and fastest(64) == "cpu" and measured == [2, 2]
    file.unlink()
    assert fastest() == "cpu" and file.exists() and len(measured) == 4


def broken(file, what):
    """Leaves the file in some state of disrepair."""
    kept = json.loads(file.read_bytes())
    (here, kinds), = kept.items()
    (kind, times), = kinds.items()
    damaged = {
        "empty": b"", "cut": file.read_bytes()[:40], "not text": bytes(range(256)), "a list": b"[1, 2]",
        "deep": b"[" * 100_000, "another machine": json.dumps({"a GPU": kinds}).encode(),
        "no kinds": json.dumps({here: 3}).encode(), "no times": json.dumps({here: {kind: None}}).encode(),
        "no sizes": json.dumps({here: {kind: times[:1]}}).encode(),
        "words": json.dumps({here: {kind: [{name: "quick" for name in times[0]}] * 2}}).encode()}
    file.write_bytes(damaged[what])


@pytest.mark.parametrize("what", ["empty", "cut", "not text", "a list", "deep", "another machine", "no kinds",
                                  "no times", "no sizes", "words"])
def test_a_file_that_says_nothing_is_measured_again(file, measured, what):
    fastest()
    broken(file, what)
    assert fastest() == fastest() == "cpu" and len(measured) == 4
    assert ("a GPU" in json.loads(file.read_bytes())) == (what == "another machine")


@pytest.mark.parametrize("what", ["no file named", "read-only", "a folder", "below a file"])
def test_where_nothing_can_be_kept_it_is_measured_for_the_process(file, measured, monkeypatch, what):
    if what == "no file named":
        monkeypatch.delenv(selfcheck.FILE)
    elif what == "read-only":  # root may write anywhere, so the disk says it
        def refuse(*_):
            raise OSError(30, "Read-only file system")
        monkeypatch.setattr(selfcheck, "write_whole", refuse)
    elif what == "a folder":
        file.mkdir(parents=True)
    else:
        file.parent.write_text("")
    assert fastest() == selfcheck.fastest(WAYS, CPU, 512, KIND).backend.NAME == "cpu" and len(measured) == 2
    assert not file.is_file()


def test_what_fails_takes_forever_and_out_of_memory_is_raised():
    def raising(error):
        def call():
            raise error
        return call

    found = selfcheck.milliseconds({"a": lambda: None, "b": raising(RuntimeError("no such kernel"))}, CPU)
    assert found["a"] < 1e6 and found["b"] == float("inf")
    with pytest.raises(torch.OutOfMemoryError):
        selfcheck.milliseconds({"a": raising(torch.OutOfMemoryError("out of memory"))}, CPU)


def test_real_products_are_timed(file):
    """On this machine, by whatever it has."""
    choice = backends.choose(Setting(), CPU, 512, TERNARY, torch.bfloat16)
    kept = json.loads(file.read_bytes()) if choice.digits else {}
    assert all(ms > 0 for kinds in kept.values() for times in kinds.values() for each in times for ms in each.values())


def test_one_way_and_mlx_need_no_measure(measured):
    assert selfcheck.fastest(WAYS[:1], CPU, 512, KIND) is WAYS[0]
    assert selfcheck.fastest(WAYS, torch.device("mps"), 512, KIND) is WAYS[0] and not measured


@pytest.mark.parametrize(("precision", "dtype", "expected"), [
    ("auto", torch.float32, {0, 2}), ("exact", torch.float32, {0}), ("exact", torch.bfloat16, {0, 2}),
    ("fast", torch.float32, {"adaptive", 0, 2})])
def test_what_competes_for_a_precision(monkeypatch, precision, dtype, expected):
    """``fast`` is never slower than exact: that competes, too."""
    seen = []
    monkeypatch.setattr(selfcheck, "problem", lambda *_: None)
    monkeypatch.setattr(selfcheck, "fastest", lambda ways, *_: seen.extend(ways) or ways[-1])
    choice = backends.choose(Setting("auto", precision), CPU, 512, TERNARY, dtype)
    if "llvmlite" not in choice.reason:
        assert {way.digits for way in seen} == expected
    assert ("fast means exact here" in choice.reason) == (precision == "fast")
