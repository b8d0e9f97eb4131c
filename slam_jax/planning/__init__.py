"""Planning: memory, operations and communication of a run, without its devices."""
