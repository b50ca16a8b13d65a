"""The weights: layer files on disk, the working copy in memory, or layers streamed through it."""
