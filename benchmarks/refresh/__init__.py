"""How much of real gradients the bases keep: those of sketches against those of exact decompositions."""
