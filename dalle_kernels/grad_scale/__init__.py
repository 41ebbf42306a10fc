"""Scale, cast, filter: the casts around a resblock under its own loss scale (paper 2.4, Figure 4)."""
