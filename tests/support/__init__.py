"""What tests share: tiny models and rows, runs of them, commands as processes, and what plays their parts in these."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
