"""The paper's tables and figures: its numbers, how we make ours, and both side by side."""
