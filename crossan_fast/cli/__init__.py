"""The `crossan-fast` command line, one file a command."""
