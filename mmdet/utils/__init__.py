"""Helpers of the tools and the engine."""
