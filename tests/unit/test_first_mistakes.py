"""First mistakes, and whatever code of the user's raises: one line that says what came, where, and what to do."""

import pickle
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import DataLoader, Dataset

import isoflat
from isoflat.core.raised import first_line, is_out_of_memory, plain
from isoflat.risk.foreign import InWords, translated

CE = nn.CrossEntropyLoss()
X, Y = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
BOTH = isoflat.BatchLoss(lambda model, batch: (CE(model(batch[0]), batch[1]) * len(batch[1]), len(batch[1])))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def measured(net, data, loss=None, **options):
    return isoflat.measure(net, data, loss, **{"measure": "hessian_spectral_norm", "geometry": "euclidean", **options})


def refusal(net, data, loss=None, **options):
    with pytest.raises(isoflat.IsoflatError) as found:
        measured(net, data, loss, **options)
    text = str(found.value)
    assert "\n" not in text
    assert len(text) < 900
    return found.value, text


@pytest.mark.parametrize(
    ("data", "loss", "words"),
    [
        ((X, Y), None, ["No loss was given", "loss=torch.nn.CrossEntropyLoss()", "batch 0"]),
        ([X], None, ["no loss was given", "output (Tensor)"]),
        ((X, Y.double()), CE, ["CrossEntropyLoss", "targets.long()", "(20,) float64", "batch 0"]),
        ((X, Y.double()), lambda output, target: F.cross_entropy(output, target), ["targets.long()", "(20,) float64"]),
        ((X[:, :3], Y), CE, ["Sequential", "'0', Linear(in_features=4", "(20, 3) float64", "batch 0"]),
        ((X, Y + 3), CE, ["from 3 to 5", "3 classes, 0 to 2"]),
        ((X, Y), "cross_entropy", ["'cross_entropy'", "loss=torch.nn.CrossEntropyLoss()"]),
        ((X, Y), "mse", ["'mse'", "loss=torch.nn.MSELoss()"]),
        ((X, Y), "HuberLoss", ["'HuberLoss'", "loss=torch.nn.HuberLoss()"]),
        ((X, Y), "kl_div", ["'kl_div'", "loss=torch.nn.functional.kl_div"]),
        ((X, Y), "mine", ["'mine'", "such as loss=torch.nn.CrossEntropyLoss()"]),
        (X, Y, ["Tensor as a loss", "isoflat.measure(model, (inputs, targets), loss)"]),
        ([X, Y], CE, ["got Tensor", "(inputs, targets)"]),
        ((X, Y), nn.TripletMarginLoss(), ["(anchor, positive, negative)", "BatchLoss", "map(model, batch)"]),
        ((X, Y), nn.CosineEmbeddingLoss(), ["(input1, input2, target)", "BatchLoss", "batch[-1]"]),
        ((X, Y), nn.MarginRankingLoss(), ["(input1, input2, target)", "BatchLoss"]),
        ((X, Y), nn.CTCLoss(), ["input_lengths", "BatchLoss"]),
        ((X, Y), lambda output: output.mean(), ["takes (output)", "BatchLoss"]),
        ((X, Y), lambda model, inputs, target: 0, ["takes (model, inputs, target)", "BatchLoss"]),
        ((X, Y), isoflat.BatchLoss(CE), ["CrossEntropyLoss", "function of output and target"]),
        ((X, Y), isoflat.BatchLoss(lambda model, batch: (CE(model(batch[0]), batch[1]), None)), ["(sum, count)", "NoneType"]),
        ((X, Y), lambda output, target: torch.tensor(output.numpy().mean()), ["with torch"]),
    ],
)  # fmt: skip
def test_one_line_with_the_remedy(net, data, loss, words):
    error, text = refusal(net, data, loss)
    assert isinstance(error, isoflat.UsageError)
    assert [word for word in words if word not in text] == []


def test_what_fits_is_not_refused(net):
    """The negative control: the same data and losses, as they are meant."""
    truth = measured(net, (X, Y), CE).value
    whole = partial(F.cross_entropy, reduction="mean")
    for loss in (BOTH, whole, lambda output, target, weight=None: F.cross_entropy(output, target, weight)):
        assert measured(net, (X, Y), loss).value == pytest.approx(truth, rel=1e-9)
    triplet = isoflat.BatchLoss(
        lambda model, batch: (nn.TripletMarginLoss()(*map(model, batch)) * len(batch[0]), len(batch[0]))
    )
    assert measured(net, [(X, X.flip(0), X.roll(3, 0))], triplet).value > 0


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lambda_max", "hessian_spectral_norm"),
        ("Max-Eigenvalue", "hessian_spectral_norm"),
        ("top_eigenvalue", "hessian_spectral_norm"),
        ("hutchinson", "hessian_trace"),
        ("trace", "hessian_trace"),
        ("sharpness", "quotient_sharpness"),
        ("fim", "fisher_trace"),
        ("ggn", "gauss_newton_trace"),
        ("llc", "local_learning_coefficient"),
        ("grad_norm", "gradient_norm"),
        ("hessian_spectral", "hessian_spectral_norm"),  # nearest by spelling
    ],
)
def test_measures_by_other_names(net, name, meant):
    error, text = refusal(net, (X, Y), CE, measure=name)
    assert isinstance(error, isoflat.UnknownName)
    assert name in text and meant in text


@pytest.mark.parametrize(
    ("name", "meant"), [("plain", "euclidean"), ("canonical", "auto"), ("filterwise", "layerwise")]
)
def test_geometries_by_other_names(net, name, meant):
    assert meant in refusal(net, (X, Y), CE, geometry=name)[1]


@pytest.mark.parametrize("wrong", [None, 3, ["hessian_trace"]])
def test_names_that_are_none(net, wrong):
    assert "isoflat measures" in refusal(net, (X, Y), CE, measure=wrong)[1]
    assert "auto" in refusal(net, (X, Y), CE, geometry=wrong)[1]


LEFT = iter(())
"""Calls that a `Failing` network still answers: kept outside of it, since passes leave no traces in a network."""


class Failing(nn.Module):
    """Raises in the forward pass, from a given call on."""

    def __init__(self, error, calls=0):
        super().__init__()
        global LEFT
        torch.manual_seed(0)
        self.layer, self.error = nn.Linear(4, 3).double(), error
        LEFT = iter(range(calls))

    def forward(self, x):
        if next(LEFT, None) is None:
            raise self.error
        return self.layer(x)


ERRORS = {
    "KeyError": partial(KeyError, "no such key"),
    "AttributeError": partial(AttributeError, "'NoneType' object has no attribute 'shape'"),
    "ZeroDivisionError": partial(ZeroDivisionError, "division by zero"),
    "AssertionError": AssertionError,
    "NotImplementedError": partial(NotImplementedError, "not here"),
    "RuntimeError": partial(RuntimeError, "first line\nsecond line"),
    "ValueError": partial(ValueError, "x" * 5000),
    "FileNotFoundError": partial(OSError, 2, "No such file or directory", "weights.pt"),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("calls", [0, 3], ids=["at once", "later"])
@pytest.mark.parametrize("geometry", ["euclidean", "auto"])
def test_exceptions_of_the_model(name, calls, geometry):
    error = ERRORS[name]()
    with pytest.raises(isoflat.IsoflatError) as found:
        measured(Failing(error, calls), (X, Y), CE, geometry=geometry, measure="quotient_spectral_norm")
    text = str(found.value)
    assert "\n" not in text
    assert "second line" not in text
    assert len(text) < 1200
    if isinstance(found.value, isoflat.UserCodeError):
        assert found.value.__cause__ is error
        assert type(error).__name__ in text
        assert "Failing" in text
        assert "test_first_mistakes.py, line" in text
        assert re.search(r"\((4|20), 4\) float64", text)  # some rows, or all
        assert "BatchLoss" in text


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("batches", [1, 3])
def test_exceptions_of_the_loss(net, name, batches):
    """In the last batch only, whose number is told."""
    error = ERRORS[name]()

    def fn(model, batch):
        if float(batch[0][0, 0]) == batches - 1:
            raise error
        return BOTH.fn(model, batch)

    cut = list(zip(X.clone().split(20 // batches), Y.split(20 // batches), strict=True))[:batches]
    for place, (inputs, _) in enumerate(cut):
        inputs[0, 0] = place
    with pytest.raises(isoflat.UserCodeError) as found:
        measured(net, cut, isoflat.BatchLoss(fn), measure="gradient_norm")
    text = str(found.value)
    assert found.value.__cause__ is error
    assert "the loss fn" in text
    assert f"batch {batches - 1}" in text
    assert "\n" not in text


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt(), torch.OutOfMemoryError("none left")])
def test_what_is_no_mistake_passes(error):
    with pytest.raises(type(error)):
        measured(Failing(error), (X[:1], Y[:1]), CE)


def test_refusals_pass_as_they_are():
    error = isoflat.NonFinite("mine")
    with pytest.raises(isoflat.NonFinite, match=r"^mine$"):
        measured(Failing(error), (X, Y), CE)


def test_mistakes_of_the_library_are_not_the_users():
    """A fault that no code of the user's is part of must be seen with its traceback."""

    def broken():
        return {}["missing"]

    with pytest.raises(KeyError), InWords():
        broken()
    try:
        broken()
    except KeyError as error:
        assert translated(error) is None


def test_a_fault_inside_the_library_stays_one(net, monkeypatch):
    monkeypatch.setattr("isoflat.measurement.engine.at_equal_loss", int)
    with pytest.raises(TypeError, match=r"int\(\) argument"):
        measured(net, (X, Y), CE)


class Backless(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, slope):
        raise ValueError("no way back")


def test_exceptions_of_a_backward_pass(net):
    _, text = refusal(net, (X, Y), lambda output, target: F.cross_entropy(Backless.apply(output), target))
    assert "backward pass" in text and "no way back" in text and "params=" in text


class Broken(Dataset):
    def __init__(self, get):
        self.get = get

    def __len__(self):
        return 20

    def __getitem__(self, place):
        return self.get(place)


def missing(place):
    raise FileNotFoundError(2, "No such file", f"{place}.png")


@pytest.mark.parametrize("get", [missing, lambda place: (X[place, : 1 + place % 2], 0), lambda place: (object(), 0)])
@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: DataLoader(data, 4)])
def test_exceptions_of_the_data(net, get, wrap):
    error, text = refusal(net, wrap(Broken(get)), CE)
    assert isinstance(error, isoflat.UserCodeError)
    assert "reading the data" in text and "collate_fn" in text


def test_one_measure_that_fails_leaves_the_others(net):
    def loss(output, target):
        return F.cross_entropy(output, target) * (1 + 0 * float(output.detach().numpy().sum()))

    table = isoflat.measure_all(
        net, (X, Y), loss, measures=["hessian_spectral_norm", "fisher_trace"], geometry="euclidean"
    )
    assert [record.measure for record in table] == ["hessian_spectral_norm"]
    assert "with torch" in table.omitted[0].reason


def test_examples_are_drawn_with_any_function(net):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3500, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (3500,), generator=generator)
    function = lambda output, target: F.cross_entropy(output, target)  # noqa: E731
    of_criterion, found = (measured(net, (x, y), loss, sample="auto", rtol=0.5, seed=1) for loss in (CE, function))
    assert (found.lower, found.upper) == (of_criterion.lower, of_criterion.upper)
    assert found.lower <= measured(net, (x, y), CE).value <= found.upper
    assert any("sampled" in note for note in found.notes)


class Centres(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.centres = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, output, target):
        return (output - self.centres[target]).square().sum(1).mean()


CENTRES = Centres()


@pytest.mark.parametrize(
    "loss",
    [
        CENTRES,
        lambda output, target: CENTRES(output, target),
        partial(lambda kept, output, target: kept(output, target), CENTRES),
        isoflat.BatchLoss(lambda model, batch: (CENTRES(model(batch[0]), batch[1]) * len(batch[1]), len(batch[1]))),
    ],
    ids=["module", "global", "partial", "batch"],
)
def test_trainable_tensors_of_a_loss_are_named(net, loss):
    found = measured(net, (X, Y), loss)
    assert any("Centres.centres" in note and "held" in note for note in found.notes)
    assert CENTRES.centres.grad is None


def test_a_loss_that_reaches_the_model_holds_nothing(net):
    def penalised(output, target):
        return F.cross_entropy(output, target) + 1e-3 * net[0].weight.square().sum()

    for loss in (CE, penalised):
        assert not any("held" in note for note in measured(net, (X, Y), loss).notes)


def test_complex_weights_are_refused_with_the_way_to_hold_them():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))

        def forward(self, x):
            return (x.to(self.w.dtype) @ self.w).abs()

    class Real(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.w = nn.Parameter(torch.view_as_real(inner.w.detach()).clone())

        def forward(self, x):
            return (x.to(torch.complex128) @ torch.view_as_complex(self.w)).abs()

    error, text = refusal(Complex(), (X, Y), CE)
    assert isinstance(error, isoflat.UnsupportedModel)
    assert "view_as_real" in text and "'w'" in text
    assert measured(Real(Complex()), (X, Y), CE).converged


def test_losses_without_a_hash(net):
    class Equal:
        def __eq__(self, other):
            return True

        __hash__ = None

        def __call__(self, output, target):
            return F.cross_entropy(output, target)

    assert measured(net, (X, Y), Equal()).value == pytest.approx(measured(net, (X, Y), CE).value, rel=1e-9)


def test_weights_without_a_network(net):
    assert "load it into the network" in refusal(net.state_dict(), (X, Y), CE)[1]


BEGGING = [
    "Trying to use forward AD with foo. Please file an issue to PyTorch at https://github.com/pytorch/pytorch/issues/new",
    "We don't support vmap over .item(). If error is occurring somewhere inside PyTorch internals, please file a bug report.",
    "no kernel for this. Open an issue on GitHub.",
]


@pytest.mark.parametrize("text", BEGGING)
def test_requests_to_other_authors_do_not_reach_the_user(net, text):
    assert "github" not in plain(text).lower() and "bug report" not in plain(text)
    assert plain(text)
    told = refusal(Failing(RuntimeError(text)), (X, Y), CE)[1]
    assert "github" not in told.lower() and "file a" not in told
    assert plain("A plain sentence. And another!") == "A plain sentence. And another!"


def test_first_lines():
    assert first_line(RuntimeError("\n one \n two")) == "one"
    assert first_line(RuntimeError()) == "RuntimeError"
    assert first_line(RuntimeError("y" * 1000)).endswith("…")
    assert is_out_of_memory(RuntimeError("can't allocate memory")) and not is_out_of_memory(RuntimeError("other"))


def test_the_class_travels():
    """Between processes errors are sent by class and text; programs that caught RuntimeErrors catch these."""
    error = pickle.loads(pickle.dumps(isoflat.UserCodeError("text")))
    assert str(error) == "text"
    assert isinstance(error, isoflat.UsageError) and isinstance(error, RuntimeError)
