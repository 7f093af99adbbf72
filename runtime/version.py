"""The version of Tiny Diffusion, the only place that names it."""

__version__ = "1.0.0"
