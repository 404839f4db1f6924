"""Data files as people have them, and networks of libraries: read as they are meant, or refused in one line."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import isoflat
from isoflat.cli.main import app
from isoflat.core.errors import CheckpointError, DataError, UsageError
from isoflat.io.data import load_data
from isoflat.io.model import load_model

ROWS = 12


@pytest.fixture
def x():
    return torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def y():
    return torch.randint(0, 3, (ROWS,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def whole(spec, **options):
    batches = list(load_data(str(spec), batch_size=5, **options))
    return torch.cat([inputs for inputs, _ in batches]), torch.cat([targets for _, targets in batches])


def refused(spec, words, **options):
    with pytest.raises(DataError, match=words) as caught:
        whole(spec, **options)
    assert "\n" not in str(caught.value)


NAMES = [
    ("x_train", "y_train"),
    ("X_train", "y_train"),
    ("train_x", "train_y"),
    ("train_X", "train_y"),
    ("xtrain", "ytrain"),
    ("train_images", "train_labels"),
    ("train-data", "train-targets"),
    ("training_features", "training_labels"),
    ("x", "y"),
    ("X", "y"),
    ("X", "Y"),
    ("inputs", "targets"),
    ("data", "labels"),
    ("images", "label"),
]


@pytest.mark.parametrize("names", NAMES, ids="-".join)
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8, torch.int16])
def test_names_of_inputs_and_targets(x, y, names, kind):
    content = {names[0]: x, names[1]: y.to(kind), "mean": x.mean(0)}
    np.savez("a.npz", **{name: tensor.numpy() for name, tensor in content.items()})
    torch.save(content, "a.pt")
    for file in ("a.npz", "a.pt"):
        inputs, targets = whole(file)
        assert torch.equal(inputs, x)
        assert targets.dtype is torch.int64
        assert torch.equal(targets, y)


@pytest.mark.parametrize("form", ["x_{}", "{}_x", "X_{}", "{}x"])
@pytest.mark.parametrize(("word", "asked"), [("test", "test"), ("val", "validation"), ("valid", "val"), ("val", "val")])
def test_splits(x, y, form, word, asked):
    content = {}
    for place, split in enumerate(("train", word)):
        name = form.format(split)
        content |= {name: x + place, name.replace("x", "y").replace("X", "y"): y}
    np.savez("a.npz", **{name: tensor.numpy() for name, tensor in content.items()})
    torch.save(content, "a.pt")
    for file in ("a.npz", "a.pt"):
        assert torch.equal(whole(file)[0], x)
        assert torch.equal(whole(file, split=asked)[0], x + 1)
        refused(file, "choose --split", split="unknown")


def test_names_that_do_not_tell(x, y):
    for content in ({"a": x, "b": y}, {"images": x, "features": x, "labels": y}, {"X": x, "target": y, "label": y}):
        np.savez("a.npz", **{name: tensor.numpy() for name, tensor in content.items()})
        refused("a.npz", "x_train and y_train")


def saved_forms(x, y):
    return {
        "pair": (x, y),
        "list": [x, y],
        "column": (x, y[:, None]),
        "arrays": (x.numpy(), y.numpy()),
        "by columns": (np.asfortranarray(x.numpy()), y.numpy()),
        "dataset": TensorDataset(x, y),
        "examples": [(row, int(label)) for row, label in zip(x, y, strict=True)],
        "example tensors": list(zip(x, y, strict=True)),
        "splits": {"train": (x, y), "test": (x + 1, y)},
        "named splits": {"train": {"x": x, "y": y}, "test": {"x": x + 1, "y": y}},
        "dataset splits": {"train": TensorDataset(x, y), "test": TensorDataset(x + 1, y)},
        "view": (torch.cat([x, x], 1)[:, :4], y),
        "parameter": (nn.Parameter(x), y),
    }


@pytest.mark.parametrize("form", saved_forms(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)))
def test_saved_tensors(x, y, form):
    torch.save(saved_forms(x, y)[form], "a.pt")
    inputs, targets = whole("a.pt")
    assert torch.equal(inputs, x)
    assert torch.equal(targets, y)
    assert not inputs.requires_grad
    few, _ = whole("a.pt", examples=4)
    assert torch.equal(few, x[[0, 3, 6, 9]])
    if "splits" in form:
        assert torch.equal(whole("a.pt", split="test")[0], x + 1)
    else:
        refused("a.pt", "split", split="test")


def test_real_targets_stay_real(x):
    torch.save((x.double(), x[:, :1].double()), "a.pt")
    inputs, targets = whole("a.pt")
    assert inputs.dtype is targets.dtype is torch.float64
    assert targets.shape == (ROWS, 1)


class Payload:
    def __reduce__(self):
        return (open, ("canary", "w"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x, y: x, "no targets"),
        (lambda x, y: (x, x, y), "a tuple of 3"),
        (lambda x, y: [(x, y), (x, y)], "a list of 2"),
        (lambda x, y: [(x[0], 1), (x[0, :2], 0)], "differ in shape"),
        (lambda x, y: (x, y[:-1]), "number of rows"),
        (lambda x, y: {"0.weight": x}, "x_train and y_train"),
        (lambda x, y: (x[:1].expand(ROWS, 4), y), "repeats its memory"),
        (lambda x, y: (x, Payload()), "needs pickle"),
        (lambda x, y: (x[:0], y[:0]), "empty"),
        (lambda x, y: nn.Linear(2, 2), "object of torch.nn"),
    ],
)
def test_saved_data_that_is_refused(x, y, make, words, folder):
    torch.save(make(x, y), "a.pt")
    refused("a.pt", words)
    assert not (folder / "canary").exists()


def test_saved_data_that_holds_itself(x, y):
    content = {"y": y}
    content["train"] = content
    torch.save(content, "a.pt")
    refused("a.pt", "x_train and y_train")
    torch.save([(row, 1 << 70) for row in x], "a.pt")
    refused("a.pt", "a list of 12")


def table(name, header, lines, separator=","):
    text = "\n".join(separator.join(map(str, line)) for line in [header, *lines] if line)
    with open(name, "w", encoding="utf-8", newline="") as file:  # noqa: PTH123
        file.write(text + "\n")


HEADER = ["a", "b", "c", "d", "label"]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["y", "label", "Target", "class"])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_tables(x, y, separator, name, place):
    lines = [row.tolist() for row in x]
    for line, label in zip(lines, y.tolist(), strict=True):
        line.insert(place, label)
    header = ["a", "b", "c", "d"]
    header.insert(place, name)
    table("a.csv", header, lines, separator)
    inputs, targets = whole("a.csv")
    assert torch.equal(inputs, x)
    assert torch.equal(targets, y)
    few, _ = whole("a.csv", examples=3)
    assert torch.equal(few, x[[0, 4, 8]])


def test_tables_with_real_targets_quotes_and_windows_line_ends():
    with open("a.csv", "wb") as file:  # noqa: PTH123
        file.write('\ufeff"a, first","y"\r\n"1.5","2.0"\r\n-3e-1,0.25\r\n'.encode())
    inputs, targets = whole("a.csv")
    assert torch.equal(inputs, torch.tensor([[1.5], [-0.3]]))
    assert torch.equal(targets, torch.tensor([2.0, 0.25]))


@pytest.mark.parametrize(
    ("header", "last", "words"),
    [
        (None, None, "no header"),
        (["a", "b", "c", "d", "e"], None, "none could be the targets"),
        (["y", "b", "c", "d", "label"], None, "y and label"),
        (["", "b", "c", "d", "y"], None, "index=False"),
        (["Unnamed: 0", "b", "c", "d", "y"], None, "index=False"),
        (["a", "a", "c", "d", "y"], None, "two columns"),
        (["a", "b", "c", "y"], None, "4 columns"),
        (HEADER, [1, 2, "cat", 4, 1], "cat"),
        (HEADER, [1, 2, "", 4, 1], "fill in|Fill in"),
        (HEADER, [1, 2, "nan", 4, 1], "'c' is not finite in row 13"),
        (HEADER, [1, 2, 3, 4, "inf"], "'label' is not finite"),
        (HEADER, [1, 2, 3, 1], "number of columns"),
    ],
)
def test_tables_that_are_refused(x, y, header, last, words):
    lines = [[*row.tolist(), label] for row, label in zip(x, y.tolist(), strict=True)]
    table("a.csv", header, [*lines, last])
    refused("a.csv", words)


def test_other_tables_that_are_refused():
    table("a.csv", HEADER, [])
    refused("a.csv", "empty")
    table("a.csv", ["y"], [[1]])
    refused("a.csv", "targets only")
    with open("a.csv", "wb") as file:  # noqa: PTH123
        file.write(b"\xff\xfe\x00a,b\n1,2")
    refused("a.csv", "UTF-8")
    refused("absent.csv", "no such file")
    refused("absent.pt", "no such file")


def test_integer_labels_of_a_factory(x, y, monkeypatch):
    monkeypatch.setitem(sys.modules, "data_made", types.SimpleNamespace(pair=(x, y.to(torch.int32))))
    _, targets = whole("data_made:pair")
    assert targets.dtype is torch.int64
    assert torch.equal(targets, y)


@pytest.mark.parametrize("file", ["a.csv", "a.pt", "a.npz"])
def test_the_number_is_that_of_the_tensors(x, y, file, monkeypatch):
    """The loss of a file's rows is the loss of the rows themselves."""
    table("a.csv", HEADER, [[*row.tolist(), label] for row, label in zip(x, y.tolist(), strict=True)])
    torch.save((x, y.to(torch.int32)), "a.pt")
    np.savez("a.npz", X=x.numpy(), y=y.to(torch.int32).numpy())
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    hessian = torch.autograd.functional.hessian(
        lambda b: nn.functional.cross_entropy(net[1](net[0](x)) @ net[2].weight.T + b, y), net[2].bias.detach()
    )
    found = isoflat.measure(net, load_data(file), nn.CrossEntropyLoss(), geometry="euclidean", params=["2.bias"])
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-3)


# ------------------------------------------------------------------ networks of libraries


@pytest.fixture
def tiny(folder):
    """A folder that Hugging Face's library wrote, and the network."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20, num_labels=3
    )
    net = transformers.BertForSequenceClassification(config)
    net.save_pretrained(folder / "bert")
    return net


def test_networks_of_hugging_face(tiny, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notes = []
    net = load_model("hf:bert", note=notes.append)
    assert type(net).__name__ == "BertForSequenceClassification"
    assert not net.training
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in tiny.state_dict().items())
    assert notes == ["weights from bert/model.safetensors (no --weights was given)"]
    other = {name: tensor + 1 for name, tensor in tiny.state_dict().items()}
    torch.save({"model": other}, "other.pt")
    net = load_model("hf:bert", "other.pt")
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in other.items())


def test_half_precision_is_widened(tiny, folder):
    tiny.to(torch.bfloat16).save_pretrained(folder / "half")
    net = load_model("hf:half")
    assert {tensor.dtype for tensor in net.parameters()} == {torch.float32}
    assert torch.equal(net.classifier.weight, tiny.classifier.weight.float())


def _edit(folder, **changes):
    path = folder / "bert" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folders_that_do_not_fit_are_refused(tiny, folder):
    for changes, kind, words in (
        ({"architectures": ["BertModel"]}, CheckpointError, "unexpected classifier"),
        ({"architectures": ["BertForMaskedLM"]}, CheckpointError, "missing cls"),
        ({"architectures": None}, CheckpointError, "unexpected classifier"),
        ({"architectures": ["BertForSequenceClassification"], "intermediate_size": 16}, CheckpointError, "mismatched"),
        ({"model_type": "somebodys", "auto_map": {"AutoConfig": "code.Config"}}, UsageError, "is not run"),
    ):
        _edit(folder, **changes)
        (folder / "bert" / "code.py").write_text("open('canary', 'w')\n")
        with pytest.raises(kind, match=words) as caught:
            load_model("hf:bert")
        assert "\n" not in str(caught.value)
        assert not (folder / "canary").exists()
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_model("hf:absent")


def test_hostile_weights_in_a_folder_do_not_run(tiny, folder):
    (folder / "bert" / "model.safetensors").unlink()
    torch.save({"classifier.weight": Payload()}, folder / "bert" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="needs pickle"):
        load_model("hf:bert")
    assert not (folder / "canary").exists()


def test_a_module_named_hf_is_the_users(folder, monkeypatch):
    (folder / "hf.py").write_text("from torch import nn\ndef build():\n    return nn.Identity()\n")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    assert isinstance(load_model("hf:build"), nn.Identity)
    monkeypatch.delitem(sys.modules, "hf")


@pytest.fixture
def timm(monkeypatch):
    """A library with timm's calls."""
    calls = []

    def create_model(name, pretrained=False, num_classes=1000, **options):
        calls.append((name, pretrained, num_classes, options))
        return nn.Linear(4, num_classes)

    library = types.SimpleNamespace(
        create_model=create_model,
        is_model=lambda name: name == "resnet18",
        list_models=lambda pattern: ["resnet18"],
        calls=calls,
    )
    monkeypatch.setitem(sys.modules, "timm", library)
    return library


def test_networks_of_timm(timm):
    first, again, other = (load_model("timm:resnet18,num_classes=10,in_chans=1,act=gelu", seed=k) for k in (0, 0, 1))
    assert timm.calls[0] == ("resnet18", False, 10, {"in_chans": 1, "act": "gelu"})
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    torch.save({"state_dict": first.state_dict(), "args": types.SimpleNamespace(a=1)}, "a.pth.tar.pt")
    assert torch.equal(load_model("timm:resnet18,num_classes=10", "a.pth.tar.pt", seed=1).weight, first.weight)
    for spec in ("timm:hf_hub:somebody/net", "timm:resnet19", "timm:"):
        with pytest.raises(UsageError, match="timm has no network"):
            load_model(spec)
    for spec in ("timm:resnet18,pretrained=True", "timm:resnet18,checkpoint_path=x.pt", "timm:resnet18,10"):
        with pytest.raises(UsageError, match="expected timm:NAME,num_classes=10"):
            load_model(spec)


@pytest.mark.parametrize(
    ("spec", "module", "extra"), [("timm:resnet18", "timm", "timm"), ("hf:bert", "transformers", "hf")]
)
def test_missing_extras_are_one_line(spec, module, extra, folder, monkeypatch):
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, module, None)
    result = CliRunner().invoke(app, ["measure", "--model", spec, "--data", "digits"])
    assert result.exit_code == 2
    assert f"isoflat[{extra}]" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
