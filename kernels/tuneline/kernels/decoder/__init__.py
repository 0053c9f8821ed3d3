"""The fused decoder layer, built from the ops, and the plan of what its backward finds stored."""
