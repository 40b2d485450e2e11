"""How much of each transform goes where, decided without a search: by tables, by one training run, by a knapsack.

``starts.py`` makes first trials of a search from what each setting breaks (``transforms.damage``); ``bits.py`` has
the tables and the integer program for bit-widths, ``ranks.py`` the allocators of adapter ranks, ``pruning.py`` those of
masks and groups, ``sparse_training.py`` training that ends with them. ``knapsack.py`` is the exact solver behind them.
"""
