"""What benchmark.py measures, a module for each kind of figure, and the other toolkits that it compares with."""
