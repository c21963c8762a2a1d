"""A small share of every gate, in every run of the tests."""

from __future__ import annotations

import pytest
from gate_frame import Gate, Scale, all_gates

GATES = all_gates()
SEED = 0
# They start servers of their own; other tests go through the same code on every run.
SLOW = {"G11", "G17"}
PARAMS = [pytest.param(gate, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, gate in GATES.items()]


@pytest.mark.parametrize("gate", PARAMS)
def test_gate(gate: Gate) -> None:
    outcome = gate.timed(Scale(quick=True), SEED)
    print(f"{gate.name}, seed {SEED}: {outcome.reached}")
    if outcome.ok is None:
        pytest.skip(outcome.reached)
    assert outcome.ok, "\n".join(outcome.details)


def test_a_gate_says_what_it_is() -> None:
    assert all(gate.title and gate.target for gate in GATES.values())
