"""What surrounds a run: command line, signals, several processes, compile cache, memory, lock."""
