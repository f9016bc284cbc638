"""What the guarantees promise, shown with real processes that are killed at it."""
