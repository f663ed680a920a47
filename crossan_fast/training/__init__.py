"""Loop, checkpoints, evaluation."""
