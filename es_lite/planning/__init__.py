"""What a recipe needs on this machine, and how long it takes, before anything is loaded."""
