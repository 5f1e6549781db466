"""`kvsieve bench`: how fast a policy is, beside the best dense attention and the limit that bytes set.

attention_speed.py times one layer's decode step, decode_speed.py a whole model's; docs/benchmark.md says how.
"""
