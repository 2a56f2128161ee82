"""Processes, the signals they hear, and what launchers say in the environment of one. No torch in here."""
