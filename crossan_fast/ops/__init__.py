"""One file an op: plain-torch reference, registered op, gradient, dispatch."""
