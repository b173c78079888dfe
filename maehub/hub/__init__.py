"""Names of models, the Hub and its cache: from a name to a network."""
