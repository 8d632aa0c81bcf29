"""Heads that predict for each RoI."""
