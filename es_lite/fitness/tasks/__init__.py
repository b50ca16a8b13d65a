"""Tasks: kinds of prompts, each with its reward functions; one file a task."""
