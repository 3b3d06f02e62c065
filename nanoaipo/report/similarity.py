"""How alike chosen and rejected responses are (Table 2 of the paper), as the cosine of vectors.

By sentence-transformers where the package and its model are on this machine, else by TF-IDF.
"""

import functools
import importlib.util
import random

from nanoaipo.report.runs import all_iterations

EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
MAX_PAIRS = 2000  # of an iteration


def text_encoder(texts):
    """(Name of the method, function from a list of texts to their unit vectors, one a row)."""
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(EMBEDDER, local_files_only=True)  # nothing is fetched
            return EMBEDDER, functools.partial(model.encode, normalize_embeddings=True)
        except OSError as e:
            reason = str(e).splitlines()[0]
            print(f"{EMBEDDER} is not on this machine: similarity by TF-IDF ({reason})")

    from sklearn.feature_extraction.text import TfidfVectorizer

    # the full stop is there for texts without any word
    vectorizer = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]").fit([*texts, "."])
    return "TF-IDF of words", vectorizer.transform


def mean_cosine(chosen, rejected):
    """Mean over rows of the products of unit vectors (n, D), dense or sparse."""
    if hasattr(chosen, "multiply"):  # sparse
        products = chosen.multiply(rejected)
    else:
        products = chosen * rejected
    return products.sum() / chosen.shape[0]


def similarities(runs):
    """(Name of the method, {(run, t): mean cosine of chosen and rejected})."""
    samples = {}
    for name, t, iteration in all_iterations(runs):
        pairs = iteration["texts"]
        if pairs:
            samples[name, t] = random.Random(0).sample(pairs, min(MAX_PAIRS, len(pairs)))
    if not samples:
        return "", {}

    texts = []
    for pairs in samples.values():
        for chosen, rejected in pairs:
            texts += [chosen, rejected]
    method, encode = text_encoder(texts)
    cosines = {}
    for key, pairs in samples.items():
        chosen = encode([chosen for chosen, _ in pairs])
        rejected = encode([rejected for _, rejected in pairs])
        cosines[key] = mean_cosine(chosen, rejected)
    return method, cosines
