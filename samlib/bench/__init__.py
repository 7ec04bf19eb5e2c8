"""The bench: how long a step takes, as ratios between implementations that make the same update.

Read `plan` (what is compared, and the goals), `variants` and `engine` (who is compared), `protocol` (how: equality,
rounds, ratios), `speed` (one process of the bench), `run` (all of them, and the record) and `table` (the record as
text).
"""
