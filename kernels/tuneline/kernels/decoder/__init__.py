"""The fused decoder layer, built from the ops, and the choice of what it stores."""
