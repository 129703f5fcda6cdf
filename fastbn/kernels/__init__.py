"""The arithmetic: one source, compiled once for each instruction set."""
