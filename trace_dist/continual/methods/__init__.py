"""The methods: ways to learn a stream of tasks and to answer from it; ours and the baselines are peers.

A file says of its method: ``label`` and ``colour`` (of the report's palette), ``masked`` (trains a mask inside the shards),
``on_ranks`` (runs under a launcher, on any number of ranks), and its ``Options``, where it has any.
"""
