"""Heads that predict at every position."""
