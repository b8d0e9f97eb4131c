"""Above training: evaluation of checkpoints, the report page, plots, and a look at data sets."""
