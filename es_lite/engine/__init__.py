"""Who scores and advances: the processes of this machine."""
