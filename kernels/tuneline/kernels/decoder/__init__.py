"""The fused decoder layer that the ops make up, and what a run of layers keeps in memory."""
