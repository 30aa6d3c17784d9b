"""Used by every other room: exceptions, atomic file writes, progress output, units, ranks of a distributed run."""
