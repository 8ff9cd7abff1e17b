"""The judgement: baselines, diagnostics, intervals, and whether anything was learned."""
