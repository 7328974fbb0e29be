"""Rehearsals: a run's own updates at true size on tensors without values, to know memory and work before paying."""
