"""The engine of several machines: hosts on Ray, each with an engine of its own."""
