"""Seeds that do not depend on what was computed before."""

import hashlib
import json


def derive_seed(*parts):
    """A seed in [0, 2^31) from a run's seed, the iteration, a prompt's id and the like.

    vLLM gives the n samples of a request the seeds s, s + 1, ..., so requests with consecutive
    seeds would share samples. Hashes lie far apart.
    """
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
