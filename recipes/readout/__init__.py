"""Reading out a trained network: features, probes, forecasts, maps."""
