"""What serves the pipeline: the engine that owns the device, and the page over it."""
