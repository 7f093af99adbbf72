"""How a network is trained: one step, one run, flags and recipes, optimisers, what is fastest here."""
