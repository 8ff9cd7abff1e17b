"""What is put on a backbone: heads, UPerNet, and what their outputs say."""
