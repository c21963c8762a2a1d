"""The KV cache: its tensors, the blocks they are cut into, and the prefix tree over those blocks."""
