"""Intervals, tests, protocols and the samples behind them."""
