"""A model as layers: their layout, where they come from, the master on disk, the shared working copy, `advance`."""
