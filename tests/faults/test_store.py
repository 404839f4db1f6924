"""A store of cells whose writers are killed, whose files are damaged, and whose index lies."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sqlite3
import struct
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import count
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflat.core.errors import DataError, UsageError
from isoflat.experiments.store import Store, address

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no flock")

SERVER = get_context("forkserver") if sys.platform != "win32" else get_context()
SERVER.set_forkserver_preload(["isoflat.experiments.store", "pytest", "hypothesis"])

WHERE = address({"n": 1})


@contextmanager
def running(function, *args):
    """A process that runs a function of this file, forked from a server that has imported torch once."""
    call = "import runpy; runpy.run_path(file)[name](*args)"
    process = SERVER.Process(target=exec, args=(call, {"file": __file__, "name": function.__name__, "args": args}))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        process.close()


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def put(store, n):
    return store.put({"n": n}, {"third": n / 3, "by": {"seven": n / 7}}, {"w": torch.full((32, 32), n / 9)})


def whole(cell):
    n = cell.settings["n"]
    assert cell.address == address({"n": n})
    assert cell.result == {"third": n / 3, "by": {"seven": n / 7}}
    assert torch.equal(cell.tensors()["w"], torch.full((32, 32), n / 9))
    return n


@pytest.fixture
def store(tmp_path):
    """Three cells."""
    store = Store.open(tmp_path / "store")
    for n in range(3):
        put(store, n)
    return store


# Processes that are killed


def fill(folder):
    store = Store.open(folder)
    for n in count():
        if store.get(address({"n": n})) is None:
            (store.scratch(address({"n": n})) / "step").write_text("half way")
            put(store, n)


def test_killed_at_any_time_a_cell_is_whole_or_absent(tmp_path):
    draw, store, before = random.Random(0), Store.open(tmp_path), 0
    for _ in range(4):
        with running(fill, tmp_path):
            wait(lambda before=before: len(list((tmp_path / "cells").glob("*.json"))) > before)
            time.sleep(draw.random() / 30)
        cells, refused = store.cells()
        assert not refused
        assert sorted(whole(cell) for cell in cells) == list(range(len(cells)))
        assert len(cells) > before, "what was finished stays, and the next goes on"
        before = len(cells)
    assert [path.name for path in (Store.open(tmp_path).folder / "under-way").iterdir()] in (
        [],
        [address({"n": before})],
    )
    assert len(store.find({"n": 1})) == 1


EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "sqlite3.connect")


def put_and_die(folder, n, step):
    """Killed just before the given step: at each file that is opened, renamed, made or removed."""
    store, steps = Store.open(folder), count()
    store.scratch(address({"n": n}))

    def hook(event, args):
        if event in EVENTS and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    put(store, n)


@pytest.mark.parametrize("start", ["absent", "damaged"])
def test_killed_before_any_step_of_put(tmp_path, start):
    store, code, after = Store.open(tmp_path), -signal.SIGKILL, 0
    for n in count():
        where = address({"n": n})
        if start == "damaged":
            truncate(store.put({"n": n}, {"of": "another run"}, {"w": torch.zeros(3)}).weights)
        with running(put_and_die, tmp_path, n, n) as process:
            process.join(60)
            code = process.exitcode
        cells, refused = store.cells()
        assert not refused
        assert sorted(whole(cell) for cell in cells if cell.address != where) == list(range(n))
        cell = store.get(where)
        if cell is not None and (start == "absent" or sound(cell)):
            whole(cell)
            after += code != 0
        assert whole(put(store, n)) == whole(store.find({"n": n})[0]) == n
        assert not (tmp_path / "under-way" / where).exists()
        assert not list((tmp_path / "cells").glob(".*"))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert n >= 6, "it was killed at several steps"
    assert after, "and also after the cell was finished"


def sound(cell):
    try:
        cell.tensors()
    except DataError:
        return False
    return True


def put_and_die_writing(folder, result, weights):
    """Killed when a file has grown to 1000 bytes."""
    import resource

    store = Store.open(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    store.put({"n": 1}, result, weights)


@pytest.mark.parametrize("large", ["weights", "result"])
def test_killed_in_the_middle_of_a_file(tmp_path, large):
    result, weights = ({}, {"w": torch.ones(1000)}) if large == "weights" else ({"long": "x" * 5000}, None)
    store = Store.open(tmp_path)
    put(store, 0)
    with running(put_and_die_writing, tmp_path, result, weights) as process:
        process.join(60)
        assert process.exitcode == -signal.SIGXFSZ
    assert [path.stat().st_size for path in (tmp_path / "cells").glob(".*")] == [1000]
    assert store.get(WHERE) is None
    cells, refused = store.cells()
    assert [whole(cell) for cell in cells] == [0]
    assert not refused
    assert whole(put(store, 1)) == 1


def sweep(folder, cells):
    store = Store.open(folder)
    while any(store.get(address({"n": n})) is None for n in range(cells)):
        for n in range(cells):
            with store.claim(address({"n": n})) as mine:
                if mine and store.get(address({"n": n})) is None:
                    (folder / f"computed-{n}-{os.getpid()}").touch()
                    time.sleep(0.005)
                    put(store, n)


def test_processes_that_share_a_store_compute_each_cell_once(tmp_path):
    with (
        running(sweep, tmp_path, 9) as one,
        running(sweep, tmp_path, 9) as two,
        running(sweep, tmp_path, 9) as three,
    ):
        for process in (one, two, three):
            process.join(60)
            assert process.exitcode == 0
    computed = [path.name.split("-")[1:] for path in tmp_path.glob("computed-*")]
    assert sorted(int(n) for n, _ in computed) == list(range(9))
    assert len({process for _, process in computed}) > 1
    cells, refused = Store.open(tmp_path).cells()
    assert not refused
    assert sorted(whole(cell) for cell in cells) == list(range(9))


def hold(folder):
    with Store.open(folder).claim(WHERE) as mine:
        assert mine
        (folder / "held").touch()
        time.sleep(600)


def test_a_claim_ends_with_its_process(tmp_path):
    store = Store.open(tmp_path)
    with running(hold, tmp_path) as process:
        wait((tmp_path / "held").exists)
        with store.claim(WHERE) as mine, store.claim(address({"n": 2})) as other:
            assert (mine, other) == (False, True)
        process.kill()
        process.join()
        with store.claim(WHERE) as mine:
            assert mine, "at once, with no timeout"


def test_a_claim_ends_with_its_block(store):
    with store.claim(WHERE) as mine, store.claim(WHERE) as again:
        assert (mine, again) == (True, False)
    with pytest.raises(ZeroDivisionError), store.claim(WHERE):
        raise ZeroDivisionError
    with store.claim(WHERE) as mine:
        assert mine


# Files that are damaged


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def change(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


def relink(path):
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


DAMAGE = {
    "truncated": (truncate, "truncated or no strict JSON"),
    "empty": (lambda path: path.write_bytes(b""), "truncated or no strict JSON"),
    "zeros": (lambda path: path.write_bytes(bytes(200)), "truncated or no strict JSON"),
    "not text": (lambda path: path.write_bytes(b"\xff\xfe{}"), "truncated or no strict JSON"),
    "nested": (lambda path: path.write_text("[" * 100_000), "truncated or no strict JSON"),
    "NaN": (change("0.3333333333333333", "NaN"), "NaN is no number"),
    "infinity": (change("0.3333333333333333", "1e999"), "beyond what a number can hold"),
    "twice": (change('"schema":1', '"schema":1,"schema":1'), "a name appears twice"),
    "digit": (change("0.3333333333333333", "0.3333333333333334"), "corrupt or was edited"),
    "settings": (change('{"n":1}', '{"n":2}'), "corrupt or was edited"),
    "huge": (change('{"n":1}', '{"n":1' + "0" * 30 + "}"), "what no cell holds"),
    "schema": (change('"schema":1', '"schema":2'), "schema 1, got 2"),
    "field": (change('"weights"', '"burdens"'), "lacks a field"),
    "foreign": (lambda path: path.write_text('{"loss": 1}'), "another kind"),
    "list": (lambda path: path.write_text("[1]"), "another kind"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "no plain file"),
    "link": (relink, "no plain file"),
    "weights gone": (lambda path: path.with_suffix(".safetensors").unlink(), "weights .* are missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_refused_by_name_and_the_rest_stays(store, damage):
    act, message = DAMAGE[damage]
    path = store.folder / "cells" / f"{WHERE}.json"
    act(path)
    with pytest.raises(DataError, match=f"{WHERE}.json.*{message}") as caught:
        store.get(WHERE)
    cells, refused = store.cells()
    assert sorted(whole(cell) for cell in cells) == [0, 2]
    assert (path, str(caught.value)) in [(each.path, each.why) for each in refused]
    assert sorted(row["settings.n"] for row in store.rows()) == [0, 2]
    assert [whole(cell) for cell in store.find({"n": 2})] == [2]
    assert store.find({"n": 1}) == ()
    if damage == "folder":
        path.rmdir()
    assert whole(put(store, 1)) == 1, "computed again, it is mended"
    assert whole(store.get(WHERE)) == 1
    assert [whole(cell) for cell in store.find({"n": 1})] == [1]


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b""), Path.unlink, "flip"])
def test_damaged_weights_are_refused_by_name_and_mended(store, damage):
    cell = store.get(WHERE)
    if damage == "flip":
        content = bytearray(cell.weights.read_bytes())
        content[-1] ^= 1
        cell.weights.write_bytes(content)
    else:
        damage(cell.weights)
    with pytest.raises(DataError, match=rf"{WHERE}.safetensors"):
        cell.tensors()
    assert len(store.cells()[0]) + len(store.cells()[1]) == 3
    assert whole(put(store, 1)) == whole(store.get(WHERE)) == 1


def test_a_renamed_cell_is_refused_by_both_names(store):
    other = address({"n": 7})
    for suffix in ("json", "safetensors"):
        (store.folder / "cells" / f"{WHERE}.{suffix}").rename(store.folder / "cells" / f"{other}.{suffix}")
    with pytest.raises(DataError, match=f"{other}.json was renamed: .* {WHERE}"):
        store.get(other)
    assert store.get(WHERE) is None
    assert [each.path.stem for each in store.cells()[1]] == [other]


def test_foreign_files_are_named_and_ours_are_not(store):
    place = store.folder / "cells"
    for name in ("notes.txt", "ABC.json", f"{WHERE[:-1]}.json", ".DS_Store", f".{WHERE}.json.part"):
        (place / name).write_text("{}")
    (place / f"{address({'n': 9})}.safetensors").write_bytes(b"of a process that was killed before it wrote the JSON")
    cells, refused = store.cells()
    assert len(cells) == 3
    assert {each.path.name for each in refused} == {"notes.txt", "ABC.json", f"{WHERE[:-1]}.json"}
    assert all(each.path.name in each.why for each in refused)


# What is refused before anything is written


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"result\.loss\.deep is nan"),
        (float("-inf"), r"result\.loss\.deep is -inf"),
        (torch.ones(1), r"result\.loss\.deep is a torch\.Tensor"),
        ({1: 2}, r"result\.loss\.deep: names must be text, got 1"),
        ([0, {1}], r"result\.loss\.deep\[1\] is a builtins\.set"),
        (1 << 64, r"beyond 64 bits"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name(store, value, message):
    before = sorted(store.folder.rglob("*"))
    with pytest.raises(UsageError, match=message):
        store.put({"n": 5}, {"loss": {"deep": value}}, {"w": torch.ones(3)})
    with pytest.raises(UsageError, match=message.replace("result", "settings")):
        address({"loss": {"deep": value}})
    assert sorted(store.folder.rglob("*")) == before


def test_what_contains_itself_is_refused(store):
    loop: dict = {}
    loop["loop"] = loop
    with pytest.raises(UsageError, match="part of itself"):
        store.put({"n": 5}, loop, None)


@pytest.mark.parametrize("weights", [{"w": 1.5}, {"w": torch.eye(2).to_sparse()}, {3: torch.ones(2)}])
def test_weights_that_are_none_are_refused(store, weights):
    with pytest.raises(UsageError, match="dense tensors under text names"):
        store.put({"n": 5}, {}, weights)
    assert store.get(address({"n": 5})) is None


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../" + WHERE, WHERE + "/..", WHERE.upper() + "A", WHERE[1:], WHERE + "0", WHERE + "\n", "/etc"],
)
def test_what_is_no_address_reaches_no_file(store, name):
    for act in (store.get, store.claim, store.scratch):
        with pytest.raises(UsageError, match="no address"):
            act(name)


def test_a_full_disk_changes_nothing(store, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted((store.folder / "cells").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match="No space left"):
            put(store, 5)
    assert sorted((store.folder / "cells").iterdir()) == before
    assert whole(put(store, 5)) == 5


def read_only(folder):
    if os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)
    store = Store.open(folder)
    assert sorted(whole(cell) for cell in store.cells()[0]) == [0, 1]
    assert whole(store.get(WHERE)) == whole(store.find({"n": 1})[0]) == 1
    for act in (lambda: put(store, 5), lambda: store.claim(WHERE).__enter__(), lambda: store.scratch(WHERE)):
        with pytest.raises(UsageError, match=r"failed \(.*enied"):
            act()
    with pytest.raises(UsageError, match="making a store failed"):
        Store.open(folder / "another")


def test_a_folder_that_cannot_be_written_can_be_read():
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder))
        put(store, 0), put(store, 1)
        places = [Path(folder), *Path(folder).rglob("*")]
        for place in places:
            place.chmod(0o555 if place.is_dir() else 0o444)
        with running(read_only, Path(folder)) as process:
            process.join(60)
            assert process.exitcode == 0
        for place in places:
            place.chmod(0o755)


def test_open_refuses_what_is_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        Store.open(tmp_path / "file")
    with pytest.raises(UsageError, match="making a store failed"):
        Store.open(tmp_path / "file" / "below")
    for content, message in (('{"schema": 2}', "expected schema 1"), ("[1]", "expected schema 1"), ("{", "damaged")):
        (tmp_path / "isoflat-store.json").write_text(content)
        with pytest.raises(UsageError, match=message):
            Store.open(tmp_path)


# What comes back

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), 1 << 63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MAPPINGS = st.dictionaries(st.text(), JSON, max_size=4)


def bits(value):
    """Tells apart all that `==` does not: 1, 1.0 and True; 0.0 and -0.0."""
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [bits(inner) for inner in value]
    return type(value), struct.pack("d", value) if isinstance(value, float) else value


@settings(max_examples=10, deadline=None)
@given(MAPPINGS, MAPPINGS)
def test_what_is_put_returns_bit_for_bit(asked, result):
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder))
        cell = store.put(asked, result, None)
        assert bits(cell.settings) == bits(asked)
        assert bits(cell.result) == bits(result)
        assert (cell.address, cell.weights, cell.tensors()) == (address(asked), None, {})
        assert store.get(cell.address) == cell == store.put(asked, result, None)
        assert store.cells() == ((cell,), ())
        assert store.find({}) == (cell,)
        for name in (name for name in asked if "." not in name and not isinstance(asked[name], dict)):
            assert store.find({name: asked[name]}) == (cell,)


@settings(max_examples=30)
@given(MAPPINGS)
def test_an_address_does_not_depend_on_the_order(asked):
    assert address(dict(reversed(asked.items()))) == address(asked)
    assert address(json.loads(json.dumps(asked))) == address(asked)
    assert address({**asked, "more": 1}) != address({**asked, "more": 1.0})


def test_weights_return_bit_for_bit_and_tied_ones_in_full(tmp_path):
    tied = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    given = {
        "tied": tied,
        "transposed": tied.T,
        "parameter": torch.nn.Parameter(tied[0]),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 5e-324], dtype=torch.float64),
        "half": torch.arange(3, dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "none": torch.empty(0, 2),
    }
    found = Store.open(tmp_path).put({}, {}, given).tensors()
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes() if name != "half" else True
    assert torch.equal(found["half"], given["half"])


def test_a_finished_cell_is_not_overwritten(store):
    before = {path: path.stat().st_mtime_ns for path in (store.folder / "cells").iterdir()}
    assert put(store, 1) == store.get(WHERE)
    with pytest.raises(UsageError, match="finished already, with another result"):
        store.put({"n": 1}, {"third": 0.0}, None)
    assert {path: path.stat().st_mtime_ns for path in (store.folder / "cells").iterdir()} == before


def test_scratch_stays_until_the_cell_is_finished(store):
    where = address({"n": 5})
    (store.scratch(where) / "step").write_text("1")
    assert (store.scratch(where) / "step").read_text() == "1"
    put(store, 5)
    assert not (store.folder / "under-way" / where).exists()


def test_scratch_of_a_finished_cell_goes_when_the_store_is_opened(store):
    """Its process was killed in between."""
    other = store.scratch(address({"n": 5}))
    for where in (WHERE, address({"n": 2})):
        (store.scratch(where) / "step").write_text("1")
    truncate(store.get(address({"n": 2})).weights)
    Store.open(store.folder)
    assert set((store.folder / "under-way").iterdir()) == {other, store.scratch(address({"n": 2}))}


def test_rows_are_flat(tmp_path):
    store = Store.open(tmp_path)
    store.put(
        {"net": {"widths": [4, 2]}, "seed": 0}, {"loss": {"train": 0.1, "curve": [3, 1]}, "ok": True, "no": None}, {}
    )
    (row,) = store.rows()
    assert row.pop("address") == address({"net": {"widths": [4, 2]}, "seed": 0})
    assert row == {
        "settings.net.widths": "[4,2]", "settings.seed": 0, "result.loss.train": 0.1, "result.ok": True, "result.no": None,
    }  # fmt: skip


# The index


def lie(index, statement):
    with sqlite3.connect(index) as connection:
        connection.execute(statement)
    connection.close()


INDEX = {
    "as it is": lambda index: None,
    "deleted": Path.unlink,
    "no database": lambda index: index.write_text("something else" * 100),
    "truncated": truncate,
    "empty": lambda index: index.write_bytes(b""),
    "overwritten inside": lambda index: index.write_bytes(index.read_bytes()[:5000] + b"\7" * 3000),
    "a folder": lambda index: (index.unlink(), index.mkdir()),
    "of another version": lambda index: lie(index, "PRAGMA user_version = 99"),
    "another table": lambda index: (index.unlink(), lie(index, "CREATE TABLE cells (other TEXT)")),
    "behind": lambda index: lie(index, "DELETE FROM cells"),
    "with other settings": lambda index: lie(index, """UPDATE cells SET settings = '{"n":0}'"""),
    "with broken settings": lambda index: lie(index, "UPDATE cells SET settings = x'00ff'"),
    "with other times": lambda index: lie(index, "UPDATE cells SET mtime_ns = 1"),
    "with one too many": lambda index: lie(
        index,
        "INSERT INTO cells SELECT 'ffffffffffffffffffffffff', written, label, settings, mtime_ns, size FROM cells LIMIT 1",
    ),
    "a journal of another": lambda index: index.with_name("index.sqlite-journal").write_bytes(
        b"\xd9\xd5\x05\xf9" * 300
    ),
}


@pytest.mark.parametrize("state", INDEX)
def test_the_index_is_never_believed(store, state):
    index = store.folder / "index.sqlite"
    INDEX[state](index)
    assert [whole(cell) for cell in store.find({"n": 1})] == [1]
    assert sorted(whole(cell) for cell in store.find({})) == [0, 1, 2]
    assert whole(put(store, 3)) == 3
    assert [whole(cell) for cell in store.find({"n": 3})] == [3]
    assert len(store.rows()) == 4
    if state != "a folder":
        connection = sqlite3.connect(index)
        rows = dict(connection.execute("SELECT address, settings FROM cells"))
        connection.close()
        assert rows == {address({"n": n}): f'{{"n":{n}}}' for n in range(4)}, "it is whole again"


def test_lookups_tell_numbers_apart(tmp_path):
    store = Store.open(tmp_path)
    for value in (1, 1.0, True, "1", None, [1]):
        store.put({"net": {"x": value}, "label": "one"}, {}, None)
    for value in (1, 1.0, True, "1", None, [1]):
        (cell,) = store.find({"net.x": value, "label": "one"})
        assert bits(cell.settings["net"]["x"]) == bits(value)
    assert store.find({"net.x": 2}) == store.find({"y": None}) == ()
