"""Ways to break the kernels, each with the tests that must notice."""

from mutations import additive, backward, cuda, few_queries, forward, host, scores
from mutations.mutation import Mutation

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS = (
    *scores.MUTATIONS,
    *forward.MUTATIONS,
    *few_queries.MUTATIONS,
    *backward.MUTATIONS,
    *additive.MUTATIONS,
    *cuda.MUTATIONS,
    *host.MUTATIONS,
)
