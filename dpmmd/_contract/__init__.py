"""What the cores and their callers agree on: the protocol, the taps' geometry, slots, refusals."""
