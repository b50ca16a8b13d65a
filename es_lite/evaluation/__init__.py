"""What the command `evaluate` consists of."""
