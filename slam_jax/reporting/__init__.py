"""Reports: evaluation of checkpoints, the page about it, attention maps, plots, data inspection."""
