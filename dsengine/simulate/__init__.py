"""A cluster on paper: the engine's own schedulers, caches and routing, with a cost model in the place of GPUs."""
