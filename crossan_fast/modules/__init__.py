"""torch.nn modules that CrossanModel is composed of."""
