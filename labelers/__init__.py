"""Labelers, one file each: the file name is the labeler's name (`dataengine.plugins` finds them)."""
