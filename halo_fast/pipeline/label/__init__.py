"""A page on this machine where people score clips and their patches, by keyboard alone if they like."""

from halo_fast.pipeline.label.server import LabelServer, label

__all__ = ["LabelServer", "label"]
