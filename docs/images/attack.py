"""Draws attack.png: what becomes of three flatness numbers when the weights change and the function does not.

    python docs/images/attack.py

It runs `isoflat demo` (one to two minutes) and draws the first two of its attacks as the demo's report does. The numbers of
the table in the README are printed.
"""

from pathlib import Path

from isoflat.experiments.demo import MlpPlan, demonstrate
from isoflat.experiments.numbers import NUMBERS
from isoflat.report.drawing import picture
from isoflat.report.figures import Climb, ladders
from isoflat.report.pages.demo import curves

result = demonstrate(MlpPlan(), progress=True)
climbs = [Climb(f"{ladder.title}, the same function", ladder.name, curves(ladder)) for ladder in result.ladders[:2]]
Path(__file__).with_name("attack.png").write_bytes(picture(ladders(climbs, "relative change of the number")))
for number in NUMBERS:
    for arm in result.setting.arms:
        values = [network.estimate(number).value for network in result.arm(arm)]
        print(f"{number.words}, {arm.name}: {min(values):.4g} to {max(values):.4g}")
    rungs = result.ladders[1].rungs
    ends = [rung.records[number.name].estimate for rung in (rungs[0], rungs[-1])]
    print(f"{number.words}, units × {rungs[-1].amount:g}: {ends[0]} to {ends[1]}")
for sentence in (*result.comparison, *result.manipulation):
    print(sentence)
