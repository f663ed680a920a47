"""The cases, one file an op or step; importing a module registers its cases."""
