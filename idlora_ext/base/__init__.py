"""A frozen layer, however it keeps ``W``: reading weights, gathering shards, opening experts."""
