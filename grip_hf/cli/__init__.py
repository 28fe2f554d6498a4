"""The command line: `grip-hf --help`."""
