"""Speed and memory, measured: against the official code, by mode, and the server under load."""
