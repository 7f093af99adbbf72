"""Measure images and examine networks: features, figures, reports, checks and plots."""
