"""The process around a run: command line, signals, several processes, compile cache, lock."""
