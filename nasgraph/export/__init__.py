"""What comes out of a search: a folder per model that loads without nasgraph, each file checked against the model."""

from nasgraph.export.base import Exported, Outgoing, Written
from nasgraph.export.folder import Request, export_many, export_model, verify

__all__ = ["Exported", "Outgoing", "Request", "Written", "export_many", "export_model", "verify"]
