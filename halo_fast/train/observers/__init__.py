"""What watches a training: log, guards, trackers, diagnostics, previews."""
