"""AnchorTP: tensor-parallel serving that keeps answering when a device dies."""

__version__ = "0.1.0"
