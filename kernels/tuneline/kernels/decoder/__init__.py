"""The fused decoder layer, built from the ops, and what a stack of layers keeps in memory."""
