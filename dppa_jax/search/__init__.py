"""Choose the numbers of a merge: factors and coefficients that give the best scores, or the least entropy."""
