"""The kinds of row groups that the decode core runs: greedy and sampled rows, beams, and drafted rows."""
