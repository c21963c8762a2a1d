"""The demo model: a tiny, really trained DeepSeek-V3, served when no model is named, and everything that made it."""

from pathlib import Path

CHECKPOINT_DIR = Path(__file__).parent / "checkpoint"
