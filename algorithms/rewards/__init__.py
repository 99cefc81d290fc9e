"""Reward functions: loading, calling, and a few plain ones."""
