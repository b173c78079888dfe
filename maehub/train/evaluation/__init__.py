"""How good a network is: scores, probes by hand of features, evaluation, prediction."""
