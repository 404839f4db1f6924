"""Stored numbers checked by their witnesses: true ones hold, and every kind of edit is refused or found false by name."""

import hashlib
import json
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import nn
from typer.testing import CliRunner

from cases.networks import mlp
from isoflat import UsageError, measure_all
from isoflat.cli.main import app
from isoflat.core.rng import stream
from isoflat.linalg.eigen.recheck import Recheck
from isoflat.linalg.operator import Dense
from isoflat.measurement.verify import RecordVerdict, verify, verify_all
from isoflat.measurement.witnesses import packed_witnesses, seal, unpacked_witnesses

EIGENVALUES = (
    "quotient_spectral_norm", "quotient_largest_eigenvalue", "quotient_smallest_eigenvalue", "hessian_spectral_norm",
    "riemannian_hessian_spectral_norm", "quotient_sharpness(epsilon=0.5)", "gauss_newton_spectral_norm",
    "fisher_spectral_norm", "edge_of_stability(learning_rate=0.1)",
)  # fmt: skip


def _net(dtype=torch.float64, seed=0, inputs=5):
    case = mlp([inputs, 4, 3], bias=True, seed=seed)
    return replace(case, net=case.net.to(dtype), inputs=case.inputs.to(dtype))


def _kept(case, **options):
    rows = []
    measure_all(case.net, case.data, case.criterion, keep=lambda *row: rows.append(row), **options)
    return rows


def _one(case, name="quotient_spectral_norm", **options):
    return _kept(case, measures=[name], geometry="layerwise", **options)[0]


def _verify(case, record, vector, **options):
    return verify(record, vector, case.net, case.data, case.criterion, **options)


def _stored(record, **changes):
    return replace(record, estimate=replace(record.estimate, **changes))


def _dense(case):
    frame = case.frame()
    return frame[:, None] * case.hessian() * frame


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_true_numbers_hold_and_agree_with_dense_matrices(dtype):
    """Whatever precision they were measured in: the fresh products are in float64."""
    case = _net(dtype)
    rows = _kept(case, measures=EIGENVALUES, geometry="layerwise")
    if dtype == torch.float64:  # the symmetries are searched for in float64 in any case
        rows += _kept(case, measures=["quotient_spectral_norm"])
    checks = verify_all(rows, case.net, case.data, case.criterion, seed=5)
    assert [check.verdict for check in checks] == [RecordVerdict.HOLDS] * len(rows), [
        check.sentence for check in checks
    ]
    exact = replace(case, net=case.net.double(), inputs=case.inputs.double())
    spectrum = torch.linalg.eigvalsh(_dense(exact))
    covariant = torch.linalg.eigvalsh(_dense(exact) + exact.connection())
    truths = {
        "quotient_spectral_norm": (spectrum, float(spectrum.abs().max())),
        "quotient_largest_eigenvalue": (spectrum, float(spectrum[-1])),
        "quotient_smallest_eigenvalue": (spectrum, float(spectrum[0])),
        "riemannian_hessian_spectral_norm": (covariant, float(covariant.abs().max())),
    }
    for check in checks:
        if check.geometry != "layerwise" or check.measure not in truths:
            continue
        eigenvalues, value = truths[check.measure]
        low, high = check.contains
        assert bool(((eigenvalues >= low) & (eigenvalues <= high)).any())
        assert check.value == pytest.approx(value, rel=1e-2)
        if check.measure == "quotient_smallest_eigenvalue":
            assert check.reach >= value - 1e-9 * abs(value)
        else:
            assert check.reach <= value + 1e-9 * abs(value) + (1e-4 * abs(value) if dtype == torch.float32 else 0.0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(n=st.integers(1, 12), seed=st.integers(0, 2**30))
def test_two_products_never_claim_too_much(n, seed):
    """Any vector, not only an eigenvector: an eigenvalue lies near, and no bound leaves the spectrum."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    matrix = (matrix + matrix.mT) / 2
    seen = Recheck(torch.randn(n, generator=generator))(Dense(matrix), stream(seed))
    spectrum = torch.linalg.eigvalsh(matrix)
    assert float((spectrum - seen.rayleigh).abs().min()) <= seen.residual + seen.rounding
    assert float(spectrum[0]) - seen.rounding <= seen.low <= seen.rayleigh + seen.rounding
    assert seen.rayleigh - seen.rounding <= seen.high <= float(spectrum[-1]) + seen.rounding
    assert max(abs(seen.low), abs(seen.high)) - seen.rounding <= seen.length
    assert seen.length <= float(spectrum.abs().max()) + seen.rounding


@pytest.mark.parametrize("name", ["quotient_spectral_norm", "quotient_smallest_eigenvalue", EIGENVALUES[5]])
def test_edited_values_do_not_hold(name):
    case = _net()
    record, vector = _one(case, name)
    stored = record.estimate
    width = stored.upper - stored.lower
    for factor in (1.01, 0.99, -1.0):
        ends = sorted((stored.lower * factor, stored.upper * factor))
        moved = _stored(record, value=stored.value * factor, lower=ends[0], upper=ends[1])
        check = _verify(case, moved, vector)
        assert check.verdict is RecordVerdict.FALSE, (factor, check.sentence)
    inside = stored.lower + 0.5 * width
    check = _verify(case, _stored(record, value=inside), vector)
    assert check.verdict is RecordVerdict.FALSE
    assert "edited" in check.sentence
    check = _verify(case, _stored(record, residual=0.0, lower=stored.lower - width, upper=stored.upper + width), vector)
    assert check.verdict is RecordVerdict.HOLDS  # a wider interval claims less, and this residual lies within it


def test_enclosures_too_narrow_for_the_witness_are_proved_wrong():
    """A rough vector whose Rayleigh quotient and residual are stored truly, with an upper end that it contradicts."""
    case = _net()
    record, vector = _one(case)
    rough = vector / vector.norm() + 0.3 * nn.functional.normalize(torch.arange(len(vector)).double(), dim=0)
    rough = rough / rough.norm()
    image = _dense(case) @ rough
    value = float(rough @ image)
    residual = float((image - value * rough).norm())
    assert value > 0
    for upper, verdict in ((value * (1 + 1e-9), RecordVerdict.FALSE), (record.estimate.upper, RecordVerdict.HOLDS)):
        check = _verify(case, _stored(record, value=value, lower=value, upper=upper, residual=residual), rough)
        assert check.verdict is verdict, check.sentence
    signed, _ = _one(case, "quotient_largest_eigenvalue")
    low = _stored(signed, value=value, lower=value, upper=value * (1 + 1e-9), residual=residual)
    assert _verify(case, low, rough).verdict is RecordVerdict.FALSE
    small = _stored(record, value=value, lower=value, upper=value * (1 + 1e-9), residual=residual / 2)
    assert "residual" in _verify(case, small, rough).sentence


def test_other_vectors_do_not_carry_the_number():
    case = _net()
    record, vector = _one(case)
    values, vectors = torch.linalg.eigh(_dense(case))
    second = values.abs().argsort()[-2]
    for other in (
        torch.randn(len(vector), generator=stream(1), dtype=torch.float64),
        vectors[:, second],
        vector.flip(0),
    ):
        check = _verify(case, record, other)
        assert check.verdict is RecordVerdict.FALSE
        assert "another" in check.sentence
    assert _verify(case, record, -3.0 * vector).verdict is RecordVerdict.HOLDS  # of any length and sign


def test_a_consistent_lie_is_found_by_the_random_vector_where_it_is_gross_only():
    """What two products can do, and what they cannot: the sentence of the second says so."""
    case = _net(inputs=100)
    record, _ = _one(case, rtol=0.1)
    values, vectors = torch.linalg.eigh(_dense(case))
    order = values.abs().argsort()
    for place, verdict, words in (
        (0, RecordVerdict.FALSE, "two products prove"),
        (-2, RecordVerdict.HOLDS, "cannot confirm"),
    ):
        value, vector = abs(float(values[order[place]])), vectors[:, order[place]]
        lie = _stored(record, value=value, lower=value * (1 - 1e-9), upper=value * (1 + 1e-3), residual=1e-9)
        check = _verify(case, lie, vector)
        assert check.verdict is verdict, check.sentence
        assert words in check.sentence


def test_what_is_not_the_same_is_refused_by_name():
    case, other = _net(), _net(seed=1)
    record, vector = _one(case)
    x, y = case.data
    refused = [
        (verify(record, vector, other.net, case.data, case.criterion), "another network"),
        (verify(record, vector, case.net, (x.flip(0), y), case.criterion), "other data"),
        (verify(record, vector, case.net, case.data, nn.CrossEntropyLoss(label_smoothing=0.1)), "another loss"),
        (verify(record, vector, case.net, case.data, case.criterion, params="*weight"), "other"),
        (_verify(case, replace(record, versions=record.versions | {"measure": "0"}), vector), "version 0"),
        (_verify(case, replace(record, group_hash="0" * 16), vector), "another group"),
        (_verify(case, replace(record, geometry="euclidean"), vector), "another group"),
        (_verify(case, replace(record, measure="hessian_spectral_norm"), vector), "euclidean"),
        (_verify(case, record, vector[:-1]), "cut off"),
        (_verify(case, record, vector * float("nan")), "damaged"),
        (_verify(case, record, torch.zeros_like(vector)), "damaged"),
        (_verify(case, record, vector[:, None]), "damaged"),
    ]
    for check, words in refused:
        assert check.verdict is RecordVerdict.REFUSED, check.sentence
        assert words in check.sentence, check.sentence
    with pytest.raises(UsageError, match="how it was measured"):
        _verify(case, replace(record, settings={}), vector)


def test_numbers_without_a_witness_can_only_be_measured_again():
    case = _net()
    names = ["quotient_spectral_norm", "hessian_trace"]
    table = measure_all(case.net, case.data, case.criterion, measures=names, geometry="layerwise")
    unknown = replace(table[0], geometry="preconditioned")
    rows = [(table[0], None), (table[1], torch.ones(3)), (unknown, torch.ones(3))]
    checks = verify_all(rows, case.net, case.data, case.criterion)
    assert [check.verdict for check in checks] == [RecordVerdict.UNCHECKED] * 3


def test_uncertified_numbers_and_changed_scores_hold():
    case = _net()
    for options in (
        {"certify": False},
        {"certify": False, "dtype": "bfloat16", "rtol": 0.1},
        {"logits": "normalised"},
        {"params": "*weight"},
        {"logits": "loss=1.095"},
    ):
        record, vector = _one(case, **options)
        held = {"params": options["params"]} if "params" in options else {}
        check = _verify(case, record, vector, **held)
        assert check.verdict is RecordVerdict.HOLDS, (options, check.sentence)
        assert ("nothing is claimed" in check.sentence) == ("certify" in options)
        wrong = _stored(record, value=record.estimate.value * 1.001, upper=record.estimate.upper * 1.001)
        assert _verify(case, wrong, vector, **held).verdict is RecordVerdict.FALSE


def test_records_that_no_measurement_writes_are_refused():
    record, vector = _one(_net())
    for changes in ({"residual": float("inf")}, {"value": float("inf"), "upper": float("inf")}):
        check = _verify(_net(), _stored(record, **changes), vector)
        assert check.verdict is RecordVerdict.REFUSED
        assert "finite" in check.sentence


def test_witnesses_come_back_bit_for_bit_and_cut_files_do_not():
    record, vector = _one(_net())
    content = packed_witnesses([(record, vector)])
    kept, missing = unpacked_witnesses(content, [record, replace(record, measure="hessian_trace")])
    assert torch.equal(kept.vector, vector)
    assert kept.seal == seal(record) != seal(_stored(record, converged=False))
    assert missing is None
    for bad in (content[:-1], content[:20], b"", b"{}", json.dumps({"rows": []}).encode()):
        with pytest.raises(UsageError, match="cannot be read"):
            unpacked_witnesses(bad, [record])


NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10))
"""
FEW = ("--model", "verify_nets:build", "--data", "digits", "--weights", "best.safetensors")


def _run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A measured network with its witnesses."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "verify_nets.py").write_text(NETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [str(folder), *sys.path])
        from verify_nets import build

        torch.manual_seed(0)
        save_file(build().state_dict(), "best.safetensors")
        asked = ("--measure", "quotient_spectral_norm", "--measure", "hessian_trace", "--geometry", "layerwise")
        result = _run(
            "measure", *FEW, *asked, "--examples", 60, "--batch-size", 25, "--params", "*weight", "--probes", 2,
            "--out", "result.json", "--witness",
        )  # fmt: skip
        assert result.exit_code in (0, 3), result.output
        yield folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of it to spoil."""
    for name in ("result.json", "result.safetensors", "best.safetensors"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(made), *sys.path])
    return tmp_path


def _content(folder):
    return json.loads((folder / "result.json").read_text())


def _edit(folder, change):
    content = _content(folder)
    change(content)
    (folder / "result.json").write_text(json.dumps(content))


def _reseal(folder, data):
    """As someone does who knows how the file is made."""
    (folder / "result.safetensors").write_bytes(data)

    def change(content):
        content["witness"]["sha256"] = hashlib.sha256(data).hexdigest()

    _edit(folder, change)


def test_the_verb_says_that_true_numbers_hold(folder):
    """Examples, batches and parameters are not said again; the trace is left out with a command."""
    result = _run("verify", "result.json", *FEW, "--json")
    assert result.exit_code == 0, result.output
    norm, trace = json.loads(result.stdout)["files"][0]["rows"]
    assert norm["verdict"] == "holds"
    assert norm["contains"][0] <= norm["stored"]["value"] <= norm["contains"][1]
    assert trace["verdict"] == "can only be measured again"
    assert "--measure hessian_trace" in trace["sentence"]
    printed = " ".join(_run("verify", "result.json", "result.json", *FEW).stdout.split())
    assert printed.count("layerwise): holds") == 2
    assert "whatever is stored" in printed
    assert not list(folder.glob(".*.part"))


def _estimate(**changes):
    def change(content):
        content["rows"][0]["estimate"].update(changes)

    return change


def _width(content):
    stored = content["rows"][0]["estimate"]
    stored["relative_width"] = (stored["upper"] - stored["lower"]) / abs(stored["value"])


def test_edits_of_the_result_are_found(folder):
    stored = _content(folder)["rows"][0]["estimate"]
    value, upper = stored["value"], stored["upper"]

    def scaled(content):
        _estimate(**{key: 0.9 * stored[key] for key in ("value", "lower", "upper")})(content)
        _width(content)

    def narrowed(content):
        _estimate(upper=value + 0.9 * (upper - value))(content)
        _width(content)

    def stripped(content):
        del content["witness"]

    def renamed(content):
        content["rows"][0]["measure"] = "quotient_norm"

    def point(content):
        content["rows"][0]["point"]["loss"] *= 2

    def outside(content):
        content["witness"]["file"] = "../result.safetensors"

    for change, code, words in (
        (scaled, 5, "does not hold"),
        (narrowed, 2, "edited since it was written"),
        (_estimate(upper=value), 2, "was edited"),
        (_estimate(value=2 * value), 2, "outside its interval"),
        (_estimate(notes=["fine"]), 2, "edited since it was written"),
        (stripped, 2, "without a witness"),
        (renamed, 2, "cannot be checked by name"),
        (point, 2, "another loss"),
        (outside, 2, "beside it"),
        (lambda content: content.update(rows=[]), 2, "no rows"),
        (lambda content: content.update(rows=[{"schema": 1}]), 2, "no result of isoflat"),
        (lambda content: content["subject"].update(examples="60"), 2, "damaged"),
        (lambda content: content["subject"].update(transform="os:getcwd"), 2, "is not run"),
        (lambda content: content["subject"].update(examples=61), 2, "other data"),
        (_estimate(residual="small"), 2, "residual"),
        (_estimate(residual=float("nan")), 2, "damaged"),
    ):
        before = (folder / "result.json").read_text()
        _edit(folder, change)
        result = _run("verify", "result.json", *FEW)
        (folder / "result.json").write_text(before)
        assert result.exit_code == code, result.output
        assert words in " ".join(result.output.split()), result.output
        assert "Traceback" not in result.output


def test_edits_of_the_witness_are_found(folder):
    good = (folder / "result.safetensors").read_bytes()
    with safe_open(folder / "result.safetensors", "pt") as file:
        (name,), seals = file.keys(), file.metadata()
        vector = file.get_tensor(name)
    other = save({name: vector.flip(0)}, seals)
    (folder / "result.safetensors").write_bytes(other)
    for data, words in ((other, "is not the file"), (good[:-8], "is not the file"), (None, "cannot be read")):
        (folder / "result.safetensors").unlink()
        if data is not None:
            (folder / "result.safetensors").write_bytes(data)
        result = _run("verify", "result.json", *FEW)
        assert result.exit_code == 2
        assert words in result.output
        (folder / "result.safetensors").write_bytes(good)
    for data, code, words in (
        (good[:-8], 2, "cannot be read"),
        (save({name: vector[:-8].clone()}, seals), 2, "cut off"),
        (save({"x": vector}, seals), 2, "missing"),
        (other, 5, "another one"),
        (good, 0, "holds"),
    ):
        _reseal(folder, data)
        result = _run("verify", "result.json", *FEW)
        assert result.exit_code == code, result.output
        assert words in " ".join(result.output.split())


def test_other_weights_and_foreign_files_are_refused_and_do_not_hide_the_others(folder):
    (folder / "cut.json").write_text((folder / "result.json").read_text()[:-30])
    (folder / "foreign.json").write_text('{"rows": 3}')
    (folder / "list.json").write_text("[1]")
    for name, words in (
        ("cut.json", "cut off"),
        ("foreign.json", "no result"),
        ("list.json", "no result"),
        ("no", "read"),
    ):
        result = _run("verify", name, "result.json", *FEW, "--json")
        assert result.exit_code == 2
        first, second = json.loads(result.stdout)["files"]
        assert words in first["refused"]
        assert second["rows"][0]["verdict"] == "holds"
    tensors = {"0.weight": torch.zeros(4, 64), "0.bias": torch.zeros(4)}
    tensors |= {"2.weight": torch.zeros(10, 4), "2.bias": torch.zeros(10)}
    save_file(tensors, "other.safetensors")
    result = _run("verify", "result.json", *FEW[:-1], "other.safetensors")
    assert result.exit_code == 2
    assert "another network" in " ".join(result.output.split())
    for wrong in (("--loss", "mse"), ("--examples", "10"), ("--params", "0.*")):
        result = _run("verify", "result.json", *FEW, *wrong)
        assert result.exit_code == 2
        assert "it was measured with" in result.output
    assert _run("verify", "result.json", *FEW, "--loss", "cross_entropy", "--examples", "60").exit_code == 0


def test_a_witness_goes_beside_the_result_and_never_over_another_file(folder):
    few = ("--examples", 10, "--rtol", 0.5, "--geometry", "layerwise", "--witness")
    before = (folder / "best.safetensors").read_bytes()
    for asked, words in (
        ((), "--out result.json"),
        (("--out", "result.json"), "exists already"),
        (("--out", "best.json", "--force"), "another file"),
        (("--out", "new.safetensors"), "another file"),
    ):
        result = _run("measure", *FEW, *few, *asked)
        assert result.exit_code == 2, result.output
        assert words in result.output
    assert (folder / "best.safetensors").read_bytes() == before
    assert not (folder / "best.json").exists()
