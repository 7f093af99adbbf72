"""Ten exercises, explained in guide/exercises.md: one file each, with a test in test_exercises.py."""
