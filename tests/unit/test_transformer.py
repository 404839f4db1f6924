"""The demonstration on a transformer at a tiny scale: its text, its network, and that what it says follows from numbers."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from isoflat.cli.demo import everything, write
from isoflat.cli.main import app
from isoflat.core.errors import DataError, UsageError
from isoflat.experiments.data import LETTERS, characters
from isoflat.experiments.demo import demonstrate
from isoflat.experiments.demonstration import verdicts
from isoflat.experiments.families import decoder
from isoflat.experiments.loop import Regime, train
from isoflat.experiments.numbers import CANONICAL, NUMBERS, PAPER
from isoflat.experiments.transformer import TransformerPlan, extremes

TINY = TransformerPlan(
    seeds=2, target=2.4, rates=(0.003, 0.03), batch=4, windows=8, context=8, width=8, heads=2, layers=1, spreads=(0.0, 1.0)
)  # fmt: skip


@pytest.fixture(scope="module")
def result():
    return demonstrate(TINY)


def _scaled(trained, factor):
    """The network with all its numbers multiplied."""
    rows = tuple(replace(record, estimate=record.estimate.scaled(factor)) for record in trained.table)
    return replace(trained, table=replace(trained.table, rows=rows))


def _with_last(ladder, number, value):
    """The ladder with one number of its last rung replaced, and its change with it."""
    rung = ladder.rungs[-1]
    old = rung.records[number.name]
    records = {**rung.records, number.name: replace(old, estimate=old.estimate.scaled(value / old.estimate.value))}
    start = ladder.rungs[0].records[number.name].estimate.value
    changes = {**rung.changes, number.name: abs(value / start - 1)}
    return replace(ladder, rungs=(*ladder.rungs[:-1], replace(rung, records=records, changes=changes)))


def test_the_function_stays_and_only_the_canonical_number_with_it(result):
    assert all(record.estimate.converged for record in result.records)
    assert not result.missed
    for ladder in result.ladders:
        rung = ladder.rungs[-1]
        assert 0 < rung.output_change < 1e-10
        assert rung.changes[CANONICAL.name] < 1e-8
        assert rung.changes[PAPER.name] > 10


def test_the_two_that_are_edited_are_the_flattest_and_the_sharpest_of_the_other_arm(result):
    flat, sharp = extremes(result.networks)
    assert [ladder.label for ladder in result.ladders] == [flat.label, sharp.label]
    assert flat.arm != sharp.arm
    assert all(flat.estimate(CANONICAL).value <= network.estimate(CANONICAL).value for network in result.networks)
    turned = [_scaled(n, 1e-6 if n.label == sharp.label else 1.0) for n in result.networks]
    assert extremes(turned)[0].label == sharp.label


def test_the_table_holds_every_network_and_every_edit(result):
    networks, edits = result.lines[:2], result.lines[2:]
    assert [line.label for group in networks for line in group] == [network.label for network in result.networks]
    for ladder, group in zip(result.ladders, edits, strict=True):
        for line, rung in zip(group, ladder.rungs[1:], strict=True):
            assert (line.output_change, line.changes) == (rung.output_change, rung.changes)
            assert line.records == rung.records
            assert line.loss == pytest.approx(ladder.rungs[0].records[PAPER.name].point.loss, rel=1e-9)
    cells = [cell for row in everything(result).rows for cell in row]
    for number in NUMBERS:
        assert any(str(result.ladders[0].rungs[-1].records[number.name].estimate) in str(cell) for cell in cells)


def test_passing_for_a_sharper_network_follows_from_the_numbers(result):
    first, *rest = result.ladders
    arm = extremes(result.networks)[0].arm
    most = max(n.estimate(PAPER).value for n in result.networks if n.arm != arm)

    def said(value):
        edited = replace(result, ladders=(_with_last(first, PAPER, value), *rest))
        return [text for text in edited.sentences if "would pass for" in text]

    assert said(most / 2) == []
    assert "would pass for 7.0 times sharper" in said(7 * most)[0]
    assert "times flatter than that one" in said(7 * most)[0]


def test_a_canonical_number_that_moved_would_be_said_to_have_moved(result):
    first, *rest = result.ladders
    start = first.rungs[0].records[CANONICAL.name].estimate.value
    moved = replace(result, ladders=(_with_last(first, CANONICAL, 1e6 * start), *rest))
    assert "the canonical number stays" in result.manipulation[0]
    assert "the canonical number goes from" in moved.manipulation[0]
    assert not any("times flatter than that one" in text for text in moved.manipulation)


@pytest.mark.parametrize(("factor", "words"), [(1e-4, "flatter than small-step"), (1e4, "sharper than small-step")])
def test_the_verdict_goes_with_the_numbers(result, factor, words):
    small, large = result.setting.arms
    spread = [replace(n, seed=k) for k in range(3) for n in (_scaled(m, 1 + 0.01 * k) for m in result.arm(small))]
    moved = [replace(n, arm=large, seed=k) for k, n in enumerate(_scaled(m, factor) for m in spread)]
    found = verdicts((*spread, *moved), (small, large))
    assert words in found[CANONICAL.name].claim


def test_report_and_json_stand_alone(result, tmp_path):
    page = write(result, tmp_path, "isoflat demo --network transformer").read_text(encoding="utf-8")
    assert "In one table" in page
    assert "<script" not in page
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert [network["rate"] for network in content["networks"]] == [0.003, 0.003, 0.03, 0.03]
    assert content["sentences"] == list(result.sentences)


def test_characters_are_the_same_each_time_and_targets_the_next_ones():
    one, two = characters(5, 16), characters(5, 16)
    for a, b in zip((*one.train, *one.test), (*two.train, *two.test), strict=True):
        assert torch.equal(a, b)
    inputs, targets = one.train
    assert inputs.shape == (5, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs[1:, 0], targets[:-1, -1])
    assert torch.equal(one.test[0][0, 0], targets[-1, -1])
    assert set(one.vocabulary) <= LETTERS
    assert len(one.test[0]) > 100
    assert int(torch.cat([inputs, one.test[0]]).max()) < len(one.vocabulary)


def test_a_python_without_its_help_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="came without its help texts"):
        characters()


def test_too_many_windows_are_refused():
    with pytest.raises(DataError, match="too few to train on"):
        characters(windows=10**6)
    with pytest.raises(UsageError, match="must be positive"):
        characters(windows=0)


def test_a_decoder_does_not_look_ahead():
    before = torch.get_rng_state()
    net = decoder.build(11, context=8, width=8, heads=2, layers=2, seed=3).eval()
    assert torch.equal(before, torch.get_rng_state())
    random = torch.Generator().manual_seed(0)
    text = torch.randint(11, (4, 8), generator=random)
    other = text.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    with torch.no_grad():
        seen, changed = net(text), net(other)
    assert torch.allclose(seen[..., :5], changed[..., :5], atol=1e-6)
    assert not torch.allclose(seen[..., 5:], changed[..., 5:], atol=1e-3)


def test_a_learning_rate_replaces_the_usual_one():
    data = characters(4, 8)

    def weights(rate):
        net = decoder.build(len(data.vocabulary), 8, 8, 2, 1)
        regime = Regime(4, target=1e-3, max_epochs=2, rate=rate)
        train(net, data.train, regime, torch.Generator().manual_seed(0))
        return nn.utils.parameters_to_vector(net.parameters())

    assert torch.equal(weights(None), weights(1e-3))
    assert not torch.equal(weights(None), weights(1e-2))
    with pytest.raises(UsageError, match="learning rate must be positive"):
        Regime(4, rate=0.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": 1}, "at least 2 seeds"),
        ({"optimizer": "sgd"}, "are Adam's"),
        ({"rates": (0.01, 0.001)}, "smaller one first"),
        ({"spreads": (1.0, 2.0)}, "grow from zero"),
    ],
)
def test_plans_without_meaning_are_refused(change, words):
    with pytest.raises(UsageError, match=words):
        replace(TINY, **change)


def test_heads_share_the_width():
    with pytest.raises(UsageError, match="cannot share"):
        decoder.build(5, width=8, heads=3)


def test_an_unknown_network_is_refused_in_words(tmp_path):
    ran = CliRunner().invoke(app, ["demo", "--network", "transfromer", "--out", str(tmp_path / "out")])
    assert ran.exit_code == 2
    assert "Did you mean transformer?" in ran.output
    assert not (tmp_path / "out").exists()
