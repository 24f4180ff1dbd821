"""Parts: one file per kind. Spec and module stand side by side, with the formula and the paper."""
