"""Experiments: fine-tuning runs, comparisons and sweeps, and the figures of their results."""
