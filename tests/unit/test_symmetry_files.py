"""Symmetries in files: the same groups and the same numbers come back, and whatever is damaged is refused by name."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from isoflat import IsoflatError, UsageError, measure, symmetries
from isoflat.experiments.families import decoder, normed
from isoflat.io import load_symmetries, save_symmetries
from isoflat.io.symmetries import NAME

LOSS = nn.CrossEntropyLoss()


def _mixed(seed=0, width=5):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.ReLU(),
        nn.Linear(6, width),
        nn.LayerNorm(width),
        nn.Linear(width, 4),
        nn.ReLU(),
        nn.Linear(4, 3),
    )


def _data():
    return torch.randn(20, 4, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 3


def _characters():
    random = torch.Generator().manual_seed(2)
    return torch.randint(0, 6, (6, 5), generator=random), torch.randint(0, 6, (6, 5), generator=random)


NETWORKS = {
    "scales, shifts and an epsilon": (_mixed, _data),
    "batch normalisation": (lambda: normed.build((4, 6, 5, 3), seed=0).eval(), _data),
    "attention": (lambda: decoder.build(6, 5, 8, 2, 1, 0).eval(), _characters),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_read_is_what_was_written(name, tmp_path):
    build, rows = NETWORKS[name]
    net, (inputs, targets) = build(), rows()
    found = symmetries(net, inputs, loss=LOSS)
    assert found.dimension
    save_symmetries(found, tmp_path / "s.safetensors")
    again = load_symmetries(tmp_path / "s.safetensors", net)
    assert (again.hash, again.dimension, str(again)) == (found.hash, found.dimension, str(found))
    one, two = (measure(net, (inputs, targets), LOSS, symmetries=each) for each in (found, again))
    assert (one.value, one.lower, one.upper) == (two.value, two.lower, two.upper)
    save_symmetries(again, tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("symmetries") / "s.safetensors"
    save_symmetries(symmetries(_mixed(), _data()[0], loss=LOSS), path)
    return path


def test_other_weights_of_the_architecture_have_the_same_symmetries(stored):
    other = _mixed(seed=7)
    assert load_symmetries(stored, other).hash == symmetries(other, _data()[0], loss=LOSS).hash


def _edited(path, target, change):
    """The file with its JSON changed."""
    with safe_open(path, framework="pt") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads(file.metadata()[NAME])
    change(content, arrays)
    save_file(arrays, target, {NAME: json.dumps(content)})
    return target


def _nothing(content, arrays):
    pass


def _other_rules(content, arrays):
    content["rules"] += 1


def _no_group(content, arrays):
    content["found"]["basis"] = ["no such thing"]


def _other_group(content, arrays):
    content["group_hash"] = "0" * 16


def _lost_array(content, arrays):
    del arrays["0"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_other_rules, "rules"),
        (_no_group, "can be read"),
        (_other_group, "another hash"),
        (_lost_array, "can be read"),
    ],
)
def test_damage_is_refused(stored, tmp_path, change, told):
    assert load_symmetries(_edited(stored, tmp_path / "same.safetensors", _nothing), _mixed()).dimension
    with pytest.raises(UsageError, match=told):
        load_symmetries(_edited(stored, tmp_path / "edited.safetensors", change), _mixed())


def test_another_network_is_refused(stored):
    with pytest.raises(UsageError, match="another architecture"):
        load_symmetries(stored, _mixed(width=6))
    bent = _mixed()
    bent[1] = nn.Tanh()  # the same tensors, but no scales
    with pytest.raises(IsoflatError, match="change the network's output"):
        load_symmetries(stored, bent)


def test_other_files_are_refused(stored, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match="holds no symmetries"):
        load_symmetries(tmp_path / "weights.safetensors", _mixed())
    (tmp_path / "cut.safetensors").write_bytes(stored.read_bytes()[:-5])
    with pytest.raises(UsageError, match="truncated"):
        load_symmetries(tmp_path / "cut.safetensors", _mixed())
    with pytest.raises(UsageError, match="no such file"):
        load_symmetries(tmp_path / "none.safetensors", _mixed())
    found = symmetries(_mixed(), _data()[0])
    with pytest.raises(UsageError, match="exists already"):
        save_symmetries(found, stored)
    with pytest.raises(UsageError, match="ends in"):
        save_symmetries(found, tmp_path / "s.json")
