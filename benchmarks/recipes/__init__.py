"""Training on real data: configs, what builds their caches, and what was measured."""
