"""Whether four encoder processes are worth more than one of as many operations."""
