"""The model: geometry, scheduler, style projector, pipeline and its weights. Knows nothing of the web."""
