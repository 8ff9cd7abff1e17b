"""The `nepa` command: one file a task, one file of presets a field."""
