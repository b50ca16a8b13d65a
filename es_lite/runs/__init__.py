"""What a run leaves behind: its directory, the journal, metrics, checkpoints; and what it prints."""
