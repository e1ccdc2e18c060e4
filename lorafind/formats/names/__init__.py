"""Tables of true module names, as data: one generator of names per kind of network."""
