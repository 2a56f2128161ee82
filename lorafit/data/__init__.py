"""Files -> rows with true line numbers -> text -> `input_ids` and `labels`; the audit; the cache.

Importing this package loads neither torch nor datasets; `lorafit.data.prepare` does.
"""

from lorafit.data.scan import DataScan, scan

__all__ = ["DataScan", "scan"]
