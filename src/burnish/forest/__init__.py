"""A packed stream of token segments and the attention that runs over it."""
