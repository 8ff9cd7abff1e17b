"""Pages, plots, tables and the words of a result. No report runs a network."""
