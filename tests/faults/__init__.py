"""Planted faults, the one home of them: what parity must catch and name."""
