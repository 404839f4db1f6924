"""The demonstration at a tiny scale, its verdicts, and a report that stands alone."""

import re

import torch
from rich.cells import cell_len

from isoflat.cli.demo import show, write
from isoflat.experiments.data import digits
from isoflat.experiments.demo import MlpPlan, demonstrate


def test_the_demo_end_to_end(tmp_path, monkeypatch, capsys):
    before = torch.get_rng_state()
    plan = MlpPlan(seeds=2, widths=(64, 8, 8, 10), target=1.0, factors=(1.0, 100.0), shifts=(0.0, 100.0))
    result = demonstrate(plan)
    assert torch.equal(before, torch.get_rng_state())
    for record in result.records:
        assert record.estimate.converged
    report = write(result, tmp_path, "isoflat demo")
    page = report.read_text(encoding="utf-8")
    assert "Content-Security-Policy" in page
    assert "<script" not in page
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:", page)
    assert (tmp_path / "records.jsonl").read_text(encoding="utf-8").count("\n") >= len(result.records)
    monkeypatch.setenv("COLUMNS", "80")
    show(result, report)
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if cell_len(line) > 80] == []
    for record in (network.table[0] for network in result.networks):
        assert str(record.estimate) in printed


def test_digits_are_the_same_split_each_time():
    one, two = digits(), digits()
    assert torch.equal(one.train[0], two.train[0])
    assert len(one.train[0]) == 1257
    assert len(one.test[0]) == 540
