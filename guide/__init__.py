"""What stands behind GUIDE.md and experiments.md: measurements, the pictures and tables made of them, and a runner."""
