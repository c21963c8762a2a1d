"""The engine proper: requests are scheduled, batched, run and sampled here, one step at a time."""
