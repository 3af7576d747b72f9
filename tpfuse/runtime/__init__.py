"""What stands around a compiled graph: guard, cache key, reports on disk, plan check, heartbeat."""
