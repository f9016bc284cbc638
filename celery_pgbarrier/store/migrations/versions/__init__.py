"""One small file a version."""
