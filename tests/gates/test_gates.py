"""A small share of every gate, in every run of the tests."""

from __future__ import annotations

import pytest
from gate_frame import Gate, Scale, all_gates

GATES = all_gates()
SEED = 0


@pytest.mark.parametrize("gate", [pytest.param(gate, id=name) for name, gate in GATES.items()])
def test_gate(gate: Gate) -> None:
    outcome = gate.timed(Scale(quick=True), SEED)
    print(f"{gate.name}, seed {SEED}: {outcome.reached}")
    if outcome.ok is None:
        pytest.skip(outcome.reached)
    assert outcome.ok, "\n".join(outcome.details)


def test_a_gate_says_what_it_is() -> None:
    assert all(gate.title and gate.target for gate in GATES.values())
