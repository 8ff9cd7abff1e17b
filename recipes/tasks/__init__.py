"""A file for each subcommand: its options, the call, what it prints. Nothing imports this."""
