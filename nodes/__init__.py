"""The node functions and, below them, the engine. Importing this does nothing."""
