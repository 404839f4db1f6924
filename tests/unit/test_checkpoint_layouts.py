"""Checkpoints as training scripts write them: the right weights are taken, and nothing in a file ever runs."""

import argparse
import collections
import datetime
import enum
import functools
import io
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from isoflat.core.errors import CheckpointError
from isoflat.io.model import load_model
from isoflat.io.opcodes import requests
from isoflat.io.weights import read_weights


def build():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


@pytest.fixture
def state():
    torch.manual_seed(1)
    return build().state_dict()


@pytest.fixture
def averaged(state):
    """The same names with other numbers, inside torch's own wrapper."""
    net = build()
    net.load_state_dict(state)
    wrapper = AveragedModel(net)
    with torch.no_grad():
        for tensor in wrapper.module.parameters():
            tensor.add_(1)
    wrapper.n_averaged.fill_(5)
    return wrapper


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Save a content, load it into a network, and return the network's state and the notes."""
    monkeypatch.setitem(sys.modules, "layout_nets", types.SimpleNamespace(build=build))

    def run(content, key=None, strip_prefix=(), **how):
        torch.save(content, tmp_path / "last.ckpt", **how)
        return again(key, strip_prefix)

    def again(key=None, strip_prefix=()):
        notes = []
        net = load_model(
            "layout_nets:build", tmp_path / "last.ckpt", key=key, strip_prefix=strip_prefix, note=notes.append
        )
        return net.state_dict(), "\n".join(notes)

    run.again = again
    return run


def below(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


class Colour(enum.Enum):
    RED = "red"


class Options:
    def __init__(self):
        self.width = 3


class Attributes(dict):
    """A dictionary with attributes, as configuration libraries have them."""


@pytest.fixture
def elsewhere(monkeypatch):
    """A library with classes of configurations, there while a file is written and gone when it is read."""
    gone = types.ModuleType("omegaconf_like")

    class DictConfig:
        def __init__(self, content):
            self._content = content

        def __setstate__(self, state):
            raise AssertionError("code of the file's class ran")

    class ListConfig(list):
        pass

    for kind in (DictConfig, ListConfig):
        kind.__module__, kind.__qualname__ = gone.__name__, kind.__name__
        setattr(gone, kind.__name__, kind)
    sys.modules[gone.__name__] = gone
    yield gone
    sys.modules.pop(gone.__name__, None)


def beside():
    """Objects that scripts save beside weights, by name."""
    attributes = Attributes(lr=0.1)
    attributes.frozen = True
    return {
        "namespace": argparse.Namespace(lr=0.1, out=pathlib.Path("runs"), seed=None),
        "accuracy": np.float64(0.93),
        "count": np.int64(3),
        "history": np.arange(5.0),
        "random": (np.random.get_state(), np.random.default_rng(0)),
        "enumeration": Colour.RED,
        "own class": Options(),
        "dictionary": attributes,
        "default": collections.defaultdict(list, loss=[1.0]),
        "queue": collections.deque([1, 2], 3),
        "partial": functools.partial(print, 1),
        "class": nn.ReLU,
        "function": nn.functional.cross_entropy,
        "time": datetime.timedelta(seconds=3),
        "counted": collections.Counter("ab"),
        "ordered": collections.OrderedDict(a=1),
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", beside())
def test_objects_beside_the_weights_are_passed_over(load, state, name, legacy):
    if legacy and name == "class":
        pytest.skip("old files hold the source code of a network's class: refused")
    found, _ = load(
        {"net": state, "acc": 91.2, "epoch": 3, "it": beside()[name]}, _use_new_zipfile_serialization=not legacy
    )
    assert same(found, state)


def test_classes_of_absent_libraries_are_never_imported(load, state, elsewhere):
    config = elsewhere.DictConfig({"width": 3, "nested": elsewhere.ListConfig([1, 2])})
    with pytest.raises(AssertionError, match="code of the file's class"):
        pickle.loads(pickle.dumps(config))  # the negative control: a full reader does run it
    found, _ = load({"state_dict": state, "config": config})
    assert same(found, state)
    del sys.modules["omegaconf_like"]
    found, notes = load.again()
    assert same(found, state)
    assert "omegaconf_like.DictConfig" in notes
    assert "omegaconf_like" not in sys.modules


def _saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_torch_keeps_its_own_list_of_safe_names(load, state):
    before = torch.serialization.get_safe_globals()
    load({"net": state, "args": argparse.Namespace(a=1), "acc": np.float32(1)})
    assert set(torch.serialization.get_safe_globals()) == set(before)
    with pytest.raises(CheckpointError):
        load({"net": state, "args": _Payload(eval, "1")})
    assert set(torch.serialization.get_safe_globals()) == set(before)


class _Payload:
    """An object that is rebuilt by a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile(canary):
    touch = f"open({str(canary)!r}, 'w')"
    return {
        "os.system": _Payload(os.system, f"touch {canary}"),
        "Popen": _Payload(subprocess.Popen, ["touch", str(canary)]),
        "eval": _Payload(eval, touch),
        "exec": _Payload(exec, touch),
        "open": _Payload(open, str(canary), "w"),
        "import": _Payload(__import__, "antigravity"),
        "loads": _Payload(pickle.loads, pickle.dumps(_Payload(eval, touch))),
        "hub": _Payload(torch.hub.load, str(canary), "x"),
        "method": _Payload(getattr, pathlib.Path(canary), "touch"),
        "partial": _Payload(functools.partial(os.system, f"touch {canary}")),
        "numpy": _Payload(np.memmap, str(canary), "uint8", "w+", 0, (1,)),
    }


INERT = ("method", "numpy")
"""Cases whose names honest files ask for, too: they are read, as stand-ins."""


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", hostile(""))
def test_nothing_in_a_file_runs(load, state, tmp_path, name, legacy):
    canary = tmp_path / "canary"
    content = {"model": state, "args": hostile(canary)[name]}
    try:
        found, _ = load(content, _use_new_zipfile_serialization=not legacy)
    except CheckpointError as error:
        assert "refused" in str(error) or "without running" in str(error)
        assert "\n" not in str(error)
        assert "weights_only" not in str(error)
    else:
        assert name in INERT
        assert same(found, state)
    assert not canary.exists()
    assert "antigravity" not in sys.modules


def test_a_method_that_was_looked_up_cannot_be_called(tmp_path):
    canary = tmp_path / "canary"
    where = str(canary).encode()
    path = b"cpathlib\nPosixPath\nX" + struct.pack("<I", len(where)) + where + b"\x85R"
    stream = b"\x80\x02c__builtin__\ngetattr\n" + path + b"X\x05\x00\x00\x00touch\x86R)R."
    pickle.loads(stream)
    assert canary.exists()  # the negative control
    canary.unlink()
    members = {**_members({"w": torch.ones(2)}), "archive/data.pkl": stream}
    (tmp_path / "w.pt").write_bytes(_zip(members))
    with pytest.raises(CheckpointError, match="refused"):
        read_weights(tmp_path / "w.pt")
    assert not canary.exists()


def test_the_payloads_are_real(tmp_path):
    """The negative control: a full reader runs them."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(hostile(canary)["os.system"]))
    assert canary.exists()


def test_whole_networks_are_refused(load):
    for content in (build(), {"model": build()}):
        with pytest.raises(CheckpointError, match=r"Sequential.*state_dict\(\)"):
            load(content)


def test_names_that_a_stream_asks_for_are_read_off():
    stream = pickle.dumps([Attributes(a=1), collections.deque([1]), argparse.Namespace(a=1)], protocol=2)
    found = requests(io.BytesIO(stream), 1)
    assert set(found.names.values()) == {f"{__name__}.Attributes", "collections.deque", "argparse.Namespace"}
    assert found.mappings == {f"{__name__}.Attributes"}
    assert found.lists == {"collections.deque"}
    for cut in range(len(stream)):  # damage is left to the reader proper
        requests(io.BytesIO(stream[:cut]), 1)


@pytest.mark.parametrize(
    "layout",
    [
        "state_dict",
        "model",
        "model_state_dict",
        "net",
        "network",
        "module",
        "model_state",
        "weights",
        "params",
        "encoder",
    ],
)
def test_the_entry_with_the_weights_is_found(load, state, layout):
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    found, notes = load({"epoch": 3, "best_acc": 0.9, layout: state, "optimizer": moments, "loss": torch.tensor(0.1)})
    assert same(found, state)
    assert f"entry {layout!r}" in notes
    found, _ = load({"epoch": 3, layout: {"state_dict": state, "width": 3}, "optimizer_state_dict": moments})
    assert same(found, state)


@pytest.mark.parametrize("seed", range(3))
def test_damage_is_one_line(load, state, tmp_path, seed):
    """Bytes that are changed, lost or added end in a refusal or in tensors, never in another exception."""
    draw = random.Random(seed)
    whole = _saved({"net": state, "args": argparse.Namespace(a=Attributes(b=1)), "acc": np.float64(1)})
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    kept = 0
    for _ in range(60):
        stream = bytearray(members["archive/data.pkl"])
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(stream))
            stream[place : place + draw.randint(0, 2)] = bytes(draw.randrange(256) for _ in range(draw.randint(0, 2)))
        (tmp_path / "w.pt").write_bytes(_zip({**members, "archive/data.pkl": bytes(stream)}))
        try:
            kept += bool(read_weights(tmp_path / "w.pt").tensors)
        except CheckpointError as error:
            assert "\n" not in str(error)
    assert kept < 60


def test_weights_that_hold_themselves(load, state):
    content = {"epoch": 3}
    content["model"] = content
    with pytest.raises(CheckpointError, match="--weights-key"):
        load(content)
    content["net"] = state
    with pytest.raises(CheckpointError, match="holds several"):
        load(content)
    found, _ = load.again(key="net")
    assert same(found, state)


def test_weights_as_arrays_and_beside_numbers(load, state):
    found, _ = load({name: tensor.numpy() for name, tensor in state.items()})
    assert same(found, state)
    found, notes = load({**state, "epoch": 3})
    assert same(found, state)
    assert "epoch" in notes


def test_two_sets_of_weights_are_told_apart_by_the_user(load, state):
    other = {name: tensor + 1 for name, tensor in state.items()}
    with pytest.raises(CheckpointError, match=r"'generator' and 'discriminator'.*--weights-key"):
        load({"generator": state, "discriminator": other})
    found, _ = load.again(key="discriminator")
    assert same(found, other)
    with pytest.raises(CheckpointError, match="holds several"):
        load({"model": {"generator": state, "discriminator": other}})


@pytest.mark.parametrize(
    "entry", ["ema", "model_ema", "ema_state_dict", "state_dict_ema", "swa_model", "averaged_model"]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_averaged_weights_are_named_and_can_be_taken(load, state, averaged, entry, wrapped):
    average = averaged.state_dict() if wrapped else averaged.module.state_dict()
    found, notes = load({entry: average, "net": state, "epoch": 3})
    assert same(found, state)
    assert f"--weights-key {entry}" in notes
    found, notes = load.again(key=entry)
    assert same(found, averaged.module.state_dict())
    assert ("the mean of 5 networks" in notes) == wrapped


def test_averaged_weights_alone_are_taken_and_said(load, averaged):
    wanted = averaged.module.state_dict()
    for content, words in (
        (averaged.state_dict(), "the mean of 5 networks"),
        ({"ema": wanted, "step": 3}, "holds averaged weights"),
        ({"model": averaged.state_dict()}, "the mean of 5 networks"),
    ):
        found, notes = load(content)
        assert same(found, wanted)
        assert words in notes


@pytest.mark.parametrize("prefix", ["model.", "net.", "network.", "model.net.", "module.model."])
def test_lightning_checkpoints(load, state, prefix):
    extras = {"criterion.weight": torch.ones(2), "train_acc.tp": torch.zeros(2)}
    content = {
        "epoch": 1,
        "state_dict": below(prefix, state),
        "hyper_parameters": Attributes(options=Options(), mode=Colour.RED),
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(1)}}}],
        "loops": {"fit_loop": {"state_dict": {}}},
    }
    found, _ = load(content)
    assert same(found, state)
    content["state_dict"] |= extras
    found, notes = load(content)
    assert same(found, state)
    assert "criterion.weight" in notes


def test_averages_within_lightnings_state(load, state, averaged):
    average = averaged.module.state_dict()
    for inner in (average, averaged.state_dict()):
        content = {"state_dict": {**below("model.", state), **below("ema_model.", inner)}}
        found, notes = load(content)
        assert same(found, state)
        assert "--strip-prefix ema_model." in notes
        for choice in ({"strip_prefix": ("ema_model.",)}, {"key": "state_dict.ema_model"}):
            found, _ = load.again(**choice)
            assert same(found, average)


def test_lightnings_weight_averaging(load, state, averaged):
    average = averaged.module.state_dict()
    content = {
        "state_dict": below("model.", average),
        "current_model_state": below("model.", state),
        "averaging_state": {"n_averaged": torch.tensor(5)},
    }
    found, notes = load(content)
    assert same(found, average)
    assert "averaged weights" in notes
    assert "--weights-key current_model_state" in notes
    found, _ = load.again(key="current_model_state")
    assert same(found, state)


def test_two_groups_that_fit_are_not_guessed_between(load, state):
    content = {"state_dict": {**below("model.", state), **below("net.", state)}}
    with pytest.raises(CheckpointError, match=r"model\. and net\..*--strip-prefix"):
        load(content)
    found, _ = load.again(strip_prefix=("net.",))
    assert same(found, state)


def test_methods_hidden_by_attributes_do_no_harm(load, state):
    hidden = _Payload(collections.OrderedDict)
    hidden.call = (collections.OrderedDict, (), {"items": 3, "values": 3}, None, iter(state.items()))
    found, _ = load({"model": hidden})
    assert same(found, state)


def _zip(members, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content, method if "data/" in name else zipfile.ZIP_STORED)
    return file.getvalue()


def _members(content):
    with zipfile.ZipFile(io.BytesIO(_saved(content))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _start(archive):
    return struct.unpack("<I", archive[-6:-2])[0]


def test_an_archive_that_two_readers_read_differently_is_refused(tmp_path):
    """Python's reader sees the second of two joined archives; torch's, which trusts the offsets, sees the first."""
    hidden, seen = (_members({"w": torch.full((64,), float(value))}) for value in (1, 2))
    first, second = _zip(hidden), _zip(seen)
    assert _start(first) == _start(second)
    path = tmp_path / "joined.pt"
    path.write_bytes(first + second)
    with zipfile.ZipFile(path) as archive:
        python = archive.read("archive/data/0" if "archive/data/0" in archive.namelist() else archive.namelist()[-1])
    assert torch.load(path, weights_only=True)["w"][0].item() == 1  # the negative control: readers do differ
    assert python == seen["archive/data/0"]
    with pytest.raises(CheckpointError, match="two different archives"):
        read_weights(path)
    bomb = _zip(hidden, zipfile.ZIP_DEFLATED)
    path.write_bytes(bomb)
    with pytest.raises(CheckpointError, match="compressed"):
        read_weights(path)


@pytest.mark.parametrize("change", ["prepended", "appended", "comment"])
def test_nothing_may_stand_around_an_archive(tmp_path, change):
    plain = _saved({"w": torch.ones(4)})
    path = tmp_path / "w.pt"
    path.write_bytes(plain)
    assert read_weights(path).tensors["w"].shape == (4,)
    junk = {
        "prepended": b"PK\x03\x04" + plain,
        "appended": plain + b"\0" * 8,
        "comment": plain[:-2] + b"\x02\0" + b"hi",
    }[change]
    path.write_bytes(junk)
    with pytest.raises(CheckpointError, match="archive"):
        read_weights(path)


def test_contradicting_ends_are_refused(tmp_path):
    """The 64-bit record of an archive must say what its 32-bit one does, and lie where it is said to."""
    plain = _saved({"w": torch.ones(4)})
    assert plain[-42:-38] == b"PK\x06\x07"  # torch writes both
    path = tmp_path / "w.pt"
    for place, value in (
        (-42 + 8, struct.pack("<Q", 4)),
        (-98 + 48, struct.pack("<Q", 4)),
        (-98 + 32, struct.pack("<Q", 1)),
    ):
        changed = bytearray(plain)
        changed[len(plain) + place : len(plain) + place + 8] = value
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"archive|corrupt"):
            read_weights(path)
